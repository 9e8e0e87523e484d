"""Clips that a student makes in a few steps, while it is trained.

A student of whole clips makes a clip at once. A block-causal one makes it chunk
by chunk, as it will in a stream: each chunk attends to the KV cache of the
chunks that the student itself made before (Self-Forcing, arXiv 2506.08009).

The noise levels, the exits and what is differentiated follow
guandeh17/Self-Forcing `pipeline/self_forcing_training.py` (commit 33593df): a
clip is taken at one of the levels, the same for all of its chunks; the gradient
goes through the last evaluation of each chunk alone, and the KV cache is a
constant. Here each sample of a batch draws a level of its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.diffusion import flow

# (variables, noisy latents of some frames, noise levels (b,), the frames, KV
# caches of the chunks before) -> velocity.
Velocity = Callable[[Any, Array, Array, slice, Sequence[Any]], Array]
# (variables, clean latents of a chunk, its frames, KV caches of the chunks
# before) -> the KV caches of the chunks after it.
Cache = Callable[[Any, Array, slice, Sequence[Any]], Sequence[Any]]


def generate(
  velocity: Velocity,
  cache: Cache,
  variables: Any,
  levels: Sequence[float],
  size: int | None,
  drawn: Mapping[str, Any],
) -> Float[Array, "b t h w c"]:
  """Makes a batch of clips; the last evaluation of each chunk has a gradient.

  Args:
    velocity: of the student.
    cache: of the student; not called for whole clips.
    variables: of the student.
    levels: noise levels from 1 down, without the final 0.
    size: latent frames of a chunk, the last one possibly shorter; None makes
      the clips at once.
    drawn: "noise" (b, t, h, w, c); "fresh_noise" (b, n - 1, t, h, w, c), for
      all levels but the first; "exit" (b,), the number of the level at which a
      clip is taken.

  Returns:
    The clean latents that the student predicts at that level.
  """
  fixed = jax.lax.stop_gradient(variables)
  frames = drawn["noise"].shape[1]
  made: list[Array] = []
  past: Sequence[Any] = ()
  for start in range(0, frames, size or frames):
    part = slice(start, min(start + (size or frames), frames))
    model = functools.partial(velocity, frames=part, past=past)
    x, sigma = _arrive(functools.partial(model, fixed), levels, drawn, part)
    made.append(x - per_sample(sigma, x) * model(variables, x, sigma))
    if part.stop < frames:
      clean = jax.lax.stop_gradient(made[-1])
      past = cache(fixed, clean, part, past)
  return jnp.concatenate(made, axis=1)


def _arrive(velocity, levels, drawn, part):
  """Samples some frames to one of the levels, another for each sample.

  Returns:
    The noisy latents at that level, and the level (b,).
  """
  levels, leave = jnp.asarray(levels, jnp.float32), drawn["exit"]

  def step(carry, row):
    x, kept = carry
    number, sigma, following, fresh = row
    v = velocity(x, jnp.full(len(x), sigma))
    x = flow.add_noise(x - sigma * v, fresh, following)
    kept = jnp.where(per_sample(leave == number, x), x, kept)
    return (x, kept), None

  numbers = jnp.arange(1, len(levels))
  fresh = drawn["fresh_noise"][:, :, part].swapaxes(0, 1)
  noise = levels[0] * drawn["noise"][:, part]
  (_, x), _ = jax.lax.scan(
    step, (noise, noise), (numbers, levels[:-1], levels[1:], fresh)
  )
  return x, levels[leave]


def per_sample(
  values: Float[Array, "b ..."] | Any, x: Float[Array, "b ..."]
) -> Array:
  """Appends axes to values (b,) or (b, t) until they multiply x (b, t, ...)."""
  return jnp.expand_dims(values, range(values.ndim, x.ndim))
