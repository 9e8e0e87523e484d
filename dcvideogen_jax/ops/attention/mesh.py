"""Attention of samples, tokens and heads that are split over a mesh.

Every device computes whole heads, with any implementation, which therefore need
not know how to be partitioned. Where devices along "context" hold different
tokens of a sample, they exchange these for heads and back (DeepSpeed Ulysses,
arXiv 2309.14509), and each has all tokens of some heads in between.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float

from dcvideogen_jax import errors, sharding
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
  """`attention` on the mesh that `jax.set_mesh` set, or without one.

  The devices need not divide the samples and the tokens: what fills these up is
  cut off before anything attends to it.

  Args:
    q: queries, split over "batch", "tokens" and `heads`.
    k: keys, split over "batch", `keys` and `heads`.
    v: values, split like the keys.
    keys: "tokens" if the keys are split over devices as the queries are; None
      if every device has all keys.
    heads: "hidden" if devices along "tensor" have heads of their own; None if
      every device has all heads, which needs `keys` of None.
    past: keys and values before these, split over "batch" and "heads"; not
      over "heads" where `heads` is None.
    mask: as for `attention`, of all queries and keys.
    implementation: as for `attention`.

  Returns:
    Split like `q`.

  Raises:
    errors.UserError: if the devices do not divide the heads.
    NotImplementedError: as `attention`, or for a mask if a device has some of
      the queries and all keys.
    ValueError: as `attention`.
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
  """Keys and values, what is past first."""
  if past is None:
    return k, v
  return tuple(
    jnp.concatenate(both, axis=1) for both in zip(past, (k, v), strict=True)
  )


def _check_heads(mesh: AbstractMesh, heads: int, logical: str | None) -> None:
  if heads % sharding.num_shards(mesh, logical):
    sizes = " x ".join(
      f"{axis} {mesh.shape.get(axis, 1)}" for axis in sharding.LOGICAL[logical]
    )
    raise errors.UserError(
      f"{heads} attention heads cannot be split over {sizes} devices: choose "
      f"mesh sizes whose product divides {heads}"
    )


def _fill(mesh: AbstractMesh, x: Array, tokens: str | None) -> Array:
  """Zeros for samples and tokens that are missing in a multiple."""
  missing = [
    -size % sharding.num_shards(mesh, name)
    for size, name in zip(x.shape, ("batch", tokens), strict=False)
  ]
  return jnp.pad(x, ((0, missing[0]), (0, missing[1]), (0, 0), (0, 0)))


def _to_heads(x: Float[Array, "b n1 k e"]) -> Float[Array, "b n k1 e"]:
  """Inside a shard_map: all tokens of some heads, for some of all heads."""
  return jax.lax.all_to_all(x, sharding.LOGICAL["tokens"], 2, 1, tiled=True)


def _to_tokens(
  x: Float[Array, "b n k1 e"], part: int
) -> Float[Array, "b n1 k e"]:
  """The way back, to `part` tokens on each device; zeros fill them up."""
  axes = sharding.LOGICAL["tokens"]
  missing = part * jax.lax.axis_size(axes) - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
  return jax.lax.all_to_all(x, axes, 1, 2, tiled=True)
