"""Classifier-free guidance (arXiv 2207.12598), batched or one by one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

# (x, t, condition) -> velocity.
Model = Callable[[Array, Array, Any], Array]


def needed(scale: float) -> bool:
  """Whether a scale takes both branches: 1 is the condition's velocity alone.

  Every other number does, also those below 1, which follow the condition less.
  """
  return scale != 1


def guided(
  model: Model, scale: float | Float[Array, ""], *, batched: bool = True
) -> Callable[[Array, Array, Any, Any], Array]:
  """A model that follows its condition `scale` times as far.

  Its velocity is `uncond + scale * (cond - uncond)`, in float32.

  Batched, the model is called once, with twice the batch: fewer, larger matrix
  products, for twice the activations. The two branches of a sample lie next to
  each other, 2i with and 2i + 1 without its condition, so that a batch that is
  split over devices stays where it is; one branch behind the other, on the same
  split axis, would be sent around at every step.

  Args:
    model: callable `(x, t, condition) -> velocity`: x "b ...", t "b" or "b t",
      the condition any pytree of arrays with a leading axis b, such as text and
      image features.
    scale: a number, of which 1 means no guidance and one call without `uncond`;
      or an array, possibly traced, so that one compiled program serves every
      scale. An array is never looked at and always costs both branches.
    batched: whether to call the model once or twice.

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
  return model(x, t, cond), model(x, t, uncond)


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
  """The samples of both in turn, as a batched model gets its two branches."""
  return jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])
