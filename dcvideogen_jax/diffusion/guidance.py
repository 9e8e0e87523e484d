"""Classifier-free guidance (arXiv 2207.12598), in one or two model calls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from dcvideogen_jax.arrays import Array

# (x, t, condition) -> velocity.
Model = Callable[[Array, Array, Any], Array]


def needed(scale: float) -> bool:
  """Whether a guidance scale needs the branch without the condition.

  A scale of 1 is the conditional velocity alone. Every other scale needs both
  branches, including scales below 1, which weaken the condition.
  """
  return scale != 1


def guided(
  model: Model, scale: float | Float[Array, ""], *, batched: bool = True
) -> Callable[[Array, Array, Any, Any], Array]:
  """Applies classifier-free guidance to a model.

  The guided velocity is `uncond + scale * (cond - uncond)`, in float32.

  A batched model is called once, with twice the batch: it computes fewer and
  larger matrix products, and holds twice the activations. The two branches of
  sample i lie next to each other, 2i with and 2i + 1 without its condition, so
  a batch that is sharded over devices is not moved. If one branch followed the
  other on the sharded axis, samples would move between devices at every step.

  Args:
    model: callable `(x, t, condition) -> velocity`: x "b ...", t "b" or "b t",
      the condition any pytree of arrays with a leading axis b, such as text and
      image features.
    scale: a number, where 1 means no guidance and one call without `uncond`; or
      an array, possibly traced, so that one compiled program serves every
      scale. The value of an array is not inspected: it always costs both
      branches.
    batched: whether to call the model once with both branches, or once for
      each.

  Returns:
    Callable `(x, t, cond, uncond) -> velocity`, float32, shaped like x. The two
    conditions have the same structure and shapes. With scale 1 `uncond` may be
    anything, such as None.
  """
  branches = _batched if batched else _sequential

  def velocity(
    x: Float[Array, "b ..."], t: Float[Array, "b ..."], cond: Any, uncond: Any
  ) -> Float32[Array, "b ..."]:
    if isinstance(scale, int | float) and not needed(scale):
      return model(x, t, cond).astype(jnp.float32)
    v, base = branches(model, x, t, cond, uncond)
    base = base.astype(jnp.float32)
    return base + scale * (v.astype(jnp.float32) - base)

  return velocity


def _sequential(
  model: Model, x: Array, t: Array, cond: Any, uncond: Any
) -> tuple[Array, Array]:
  v = model(x, t, cond)
  # The second call waits for the first one. Otherwise XLA computes once what
  # both share, and keeps it during the first call: the embedded tokens.
  v, x, t = jax.lax.optimization_barrier((v, x, t))
  return v, model(x, t, uncond)


def _batched(
  model: Model, x: Array, t: Array, cond: Any, uncond: Any
) -> tuple[Array, Array]:
  condition = jax.tree.map(interleave, cond, uncond)
  v = model(interleave(x, x), interleave(t, t), condition)
  v = v.reshape(-1, 2, *v.shape[1:])
  return v[:, 0], v[:, 1]


def interleave(
  x: Float[Array, "b ..."], y: Float[Array, "b ..."]
) -> Float[Array, "2*b ..."]:
  """Interleaves two batches as x[0], y[0], x[1], y[1] and so on."""
  return jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])
