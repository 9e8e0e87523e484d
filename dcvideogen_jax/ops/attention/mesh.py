"""Attention whose samples, tokens and heads are sharded over a mesh.

Every device computes whole heads, so that an implementation need not support
partitioning. If devices along "context" hold different tokens of a sample, an
all-to-all gives each of them all tokens of some heads, and another all-to-all
restores the sharding of the tokens (DeepSpeed Ulysses, arXiv 2309.14509).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Float

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.attention import api, masks


def sharded_attention(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  *,
  keys: str | None,
  heads: str | None = "hidden",
  past: tuple[Float[Array, "b p k e"], Float[Array, "b p k e"]] | None = None,
  mask: masks.Mask | None = None,
  implementation: str | None = None,
) -> Float[Array, "b n k e"]:
  """Computes `attention` on the mesh that `jax.set_mesh` set, or without one.

  Samples and tokens need not be multiples of the devices: they are padded, and
  the padding is cut off before any token attends to it.

  Args:
    q: queries, sharded over "batch", "tokens" and `heads`.
    k: keys, sharded over "batch", `keys` and `heads`.
    v: values, sharded like the keys.
    keys: "tokens" if the keys are sharded over devices like the queries; None
      if every device has all keys.
    heads: "hidden" if devices along "tensor" have heads of their own; None if
      every device has all heads, which requires `keys=None`.
    past: keys and values of earlier tokens, sharded over "batch" and, unless
      `heads` is None, over "heads".
    mask: as for `attention`, over all queries and all keys, the past included.
    implementation: as for `attention`.

  Returns:
    The attention, sharded like `q`.

  Raises:
    errors.UserError: if the devices do not divide the heads.
    NotImplementedError: as for `attention`, or for a mask if the queries are
      sharded and the keys are not.
    ValueError: as for `attention`.
  """
  local = functools.partial(
    api.attention, mask=mask, implementation=implementation
  )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(q, *_joined(past, k, v))
  exchanged = keys is not None and sharding.num_shards(mesh, keys) > 1
  _check_heads(mesh, q.shape[2], "heads" if exchanged else heads)
  if (
    mask is not None
    and not exchanged
    and sharding.num_shards(mesh, "tokens") > 1
  ):
    raise NotImplementedError("a mask for queries that are split, not the keys")
  b, n, m = *q.shape[:2], k.shape[1]

  def part(q, k, v, past):
    if not exchanged:
      return local(q, *_joined(past, k, v))
    sizes = zip((q, k, v), (n, m, m), strict=True)
    all_q, k, v = (_to_heads(x)[:, :size] for x, size in sizes)
    return _to_tokens(local(all_q, *_joined(past, k, v)), q.shape[1])

  names, past_heads = ("tokens", keys, keys), "heads" if heads else None
  specs = [
    sharding.activation_spec(mesh, "batch", name, heads) for name in names
  ]
  q, k, v = (
    _fill(mesh, x, name) for x, name in zip((q, k, v), names, strict=True)
  )
  if past is not None:
    past = _fill(mesh, past[0], None), _fill(mesh, past[1], None)
  out = jax.shard_map(
    part,
    in_specs=(
      *specs,
      sharding.activation_spec(mesh, "batch", None, past_heads),
    ),
    out_specs=specs[0],
    check_vma=False,
  )(q, k, v, past)
  return out[:b, :n]


def _joined(past, k, v):
  """Prepends the keys and values of the past."""
  if past is None:
    return k, v
  return tuple(
    jnp.concatenate(both, axis=1) for both in zip(past, (k, v), strict=True)
  )


def _check_heads(mesh: AbstractMesh, heads: int, logical: str | None) -> None:
  """Raises UserError unless the devices divide the heads."""
  if heads % sharding.num_shards(mesh, logical):
    sizes = " x ".join(
      f"{axis} {mesh.shape.get(axis, 1)}" for axis in sharding.LOGICAL[logical]
    )
    raise errors.UserError(
      f"{heads} attention heads cannot be split over {sizes} devices: choose "
      f"mesh sizes whose product divides {heads}"
    )


def _fill(mesh: AbstractMesh, x: Array, tokens: str | None) -> Array:
  """Pads samples and tokens with zeros to multiples of the devices."""
  missing = [
    -size % sharding.num_shards(mesh, name)
    for size, name in zip(x.shape, ("batch", tokens), strict=False)
  ]
  return jnp.pad(x, ((0, missing[0]), (0, missing[1]), (0, 0), (0, 0)))


def _to_heads(x: Float[Array, "b n1 k e"]) -> Float[Array, "b n k1 e"]:
  """Exchanges some tokens of all heads for all tokens of some heads.

  This and `_to_tokens` are called inside a shard_map.
  """
  return jax.lax.all_to_all(x, sharding.LOGICAL["tokens"], 2, 1, tiled=True)


def _to_tokens(
  x: Float[Array, "b n k1 e"], part: int
) -> Float[Array, "b n1 k e"]:
  """Undoes `_to_heads`; pads with zeros to `part` tokens on each device."""
  axes = sharding.LOGICAL["tokens"]
  missing = part * jax.lax.axis_size(axes) - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
  return jax.lax.all_to_all(x, axes, 1, 2, tiled=True)
