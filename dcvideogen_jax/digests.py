"""Digests of arrays, which show whether loaded values equal the saved ones.

The digest of an array is the sum over its elements, modulo 2^32, of a hash of
the element's bits and its position. It is computed on the array's own devices
in one pass, and does not depend on the sharding. For each position the hash is
a bijection, so a change of a single element always changes the digest. A change
of several elements is missed with a probability of 2^-32.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped, UInt32

from dcvideogen_jax import tree
from dcvideogen_jax.arrays import Array


def of_tree(values: Any) -> dict[str, int]:
  """Returns the digest of each leaf by its name, as in `tree.names`.

  All processes call this together and get the same digests.
  """
  # One digest at a time: on CPUs, all-reduces of several programs that run at
  # once can wait for each other for ever.
  return {name: int(_digest(x)) for name, x in tree.flatten(values).items()}


def of_json(value: Any) -> int:
  """Returns the CRC-32 of a value that JSON can hold."""
  text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
  return zlib.crc32(text.encode())


@jax.jit
def _digest(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  # Elements of 8 bytes become pairs of uint32.
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
