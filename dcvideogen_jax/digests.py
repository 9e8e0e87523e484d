"""Digests of arrays that tell whether values are the ones that were saved.

The digest of an array is the sum over its elements, modulo 2^32, of a hash of
the element's bits and of its place. It is computed where the array lies, in one
pass over it, and does not depend on how it is sharded. The hash is a bijection
for each place, so a change of one element is always noticed; of many elements
all but one change in 2^32 are.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from dcvideogen_jax import tree


def of_tree(values: Any) -> dict[str, int]:
  """Name of each leaf, as `tree.names` has it, and its digest.

  Several processes call this together, and get the same.
  """
  # One after another: on CPUs, sums over devices that several programs ask for
  # at once can wait for each other for ever.
  return {name: int(_digest(x)) for name, x in tree.flatten(values).items()}


def of_json(value: Any) -> int:
  """The CRC-32 of what JSON can hold."""
  text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
  return zlib.crc32(text.encode())


@jax.jit
def _digest(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  # Elements of 8 bytes become pairs.
  unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  place = jnp.uint32(0)
  for axis, size in enumerate(bits.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place = place * jnp.uint32(size % 2**32) + index
  return jnp.sum(_mixed(bits ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
  """The finalizer of MurmurHash3: a bijection that spreads every bit."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
