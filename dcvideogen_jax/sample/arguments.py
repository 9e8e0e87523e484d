"""Checks the arguments of `DCVideoGen.generate`, and converts them."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.latents import denoiser
from dcvideogen_jax.models import streaming

Image = UInt8[np.ndarray, "h w 3"]

# One text, several texts, or their embeddings.
Prompt = str | Sequence[str] | Float[Array, "b s d"]

# Number of seeds: jax's keys take 32 bits here, so larger seeds would repeat.
_SEEDS = 2**32
# Largest size of latents, more than any run has: 32 GiB in float32.
_MOST = 2**33


def prompts(given: Prompt) -> tuple[list[str] | Any, int]:
  """Returns a list of texts or an array of embeddings, and their number.

  Raises:
    errors.UserError: if `given` is neither.
  """
  if isinstance(given, str):
    return [given], 1
  if hasattr(given, "ndim"):
    if given.ndim != 3 or not given.size:
      raise errors.UserError(
        f"expected text embeddings (b, s, d), found {given.shape}"
      )
    _require_finite(given, "text embeddings")
    return given, len(given)
  texts = list(given) if isinstance(given, Iterable) else []
  if not texts or not all(isinstance(text, str) for text in texts):
    raise errors.UserError(f"expected prompts, found {given!r}")
  return texts, len(texts)


def shown(given: Prompt) -> str | list[str] | None:
  """Returns texts in a form ready for JSON; None for embeddings."""
  if isinstance(given, str):
    return given
  return None if hasattr(given, "ndim") else list(given)


def _require_finite(given: Any, name: str) -> None:
  """Raises UserError unless an array holds finite floats."""
  array = np.asarray(given) if np.isscalar(given) else given
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise errors.UserError(f"{name} must be floats, found {array.dtype}")
  if not jnp.isfinite(array).all():
    raise errors.UserError(f"{name} must be finite, found nan or infinity")


def image(given: Any, name: str) -> Image | None:
  """Converts an image, such as one of Pillow, to an array; None stays None.

  Raises:
    errors.UserError: if the image is not RGB, uint8 (h, w, 3).
  """
  if given is None:
    return None
  array = np.asarray(given)
  shape = array.shape
  if array.dtype != np.uint8 or shape[2:] != (3,) or not array.size:
    raise errors.UserError(
      f"{name} must be uint8 (h, w, 3), found {array.dtype} {shape}"
    )
  return array


def images(task: str, first: Any, last: Any, condition: Any) -> None:
  """Checks that images are given for image to video, and only then.

  Args:
    task: "t2v" or "i2v".
    first, last: images of the first and the last frame, or None.
    condition: a condition instead of the images, or None.

  Raises:
    errors.UserError: for an image that the task does not take, or if image to
      video has neither a first image nor a condition.
  """
  given = [x for x in (first, last, condition) if x is not None]
  if task == "t2v" and given:
    raise errors.UserError("this is a text-to-video model: it takes no image")
  if task == "i2v" and first is None and condition is None:
    raise errors.UserError("this is an image-to-video model: give an image")


def steps(given: Any) -> int:
  """Checks a number of steps.

  Raises:
    errors.UserError: unless `given` is a positive whole number.
  """
  if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
    raise errors.UserError(f"steps must be at least 1, found {given!r}")
  return int(given)


def number(given: Any, name: str) -> float:
  """Converts a number to float.

  Raises:
    errors.UserError: unless `given` is a finite number.
  """
  wrong = isinstance(given, bool) or not isinstance(given, Real)
  if wrong or not math.isfinite(given):
    raise errors.UserError(f"{name} must be a finite number, found {given!r}")
  return float(given)


def noise(
  given: Any | None, seed: int | Sequence[int], shape: tuple[int, ...]
) -> tuple[Float[Array, "b ..."], list[int] | None]:
  """Returns the noise, and the seeds of it (None if the noise was given).

  Args:
    given: the noise itself, or None to draw it.
    seed: as for `seeds`.
    shape: of the noise, `b t h w c`.

  Raises:
    errors.UserError: if the noise or the seeds do not fit, or if the shape is
      larger than any memory.
  """
  if math.prod(shape) > _MOST:
    raise errors.UserError(
      f"latents of the shape {shape} are too large, expected fewer frames or "
      "a smaller picture"
    )
  if given is not None:
    if np.shape(given) != shape:
      raise errors.UserError(
        f"the noise must have the shape {shape}, found {np.shape(given)}"
      )
    values = jnp.asarray(given, jnp.float32)
    _require_finite(values, "the noise")
    return values, None
  chosen = seeds(seed, shape[0])
  return denoiser.noise(chosen, shape[1:]), chosen


def seeds(given: int | Sequence[int], count: int) -> list[int]:
  """Returns a seed for each sample.

  Args:
    given: one seed for all samples, or one for each: whole numbers from 0 to
      2^32 - 1.
    count: number of samples.

  Raises:
    errors.UserError: if the seeds are not such numbers, or not `count` of them.
  """
  try:
    every = [given] * count if isinstance(given, Integral) else given
    numbers = [operator.index(seed) for seed in every]
  except TypeError as e:
    raise errors.UserError(f"seeds are whole numbers, found {given!r}") from e
  if len(numbers) != count:
    raise errors.UserError(
      f"expected a seed per prompt, {count}, found {len(numbers)}"
    )
  if wrong := [seed for seed in numbers if not 0 <= seed < _SEEDS]:
    raise errors.UserError(
      f"a seed is from 0 to {_SEEDS - 1}, found {wrong[0]}"
    )
  return numbers


def condition(
  given: Mapping[str, Array] | None, grid: tuple[int, int, int], channels: int
) -> Mapping[str, Array]:
  """Checks a condition that was computed before; returns {} for None.

  Args:
    given: as `DCVideoGen.condition` returns it, or None.
    grid: latent frames, rows and columns.
    channels: of "extra".

  Raises:
    errors.UserError: if the condition is incomplete, has another size or is not
      finite.
  """
  if given is None:
    return {}
  shapes = {name: tuple(x.shape) for name, x in given.items()}
  wanted = (1, *grid, channels)
  if set(shapes) != {"image", "extra"} or shapes["extra"] != wanted:
    raise errors.UserError(
      f'expected a condition of "image" and of "extra" {wanted}, found {shapes}'
    )
  for name, x in given.items():
    _require_finite(x, f'a condition\'s "{name}"')
  return given


def condition_tail(given: Any, size_rule: str) -> str:
  """Returns how frames of a condition that do not fill a chunk are encoded.

  Args:
    given: one of `streaming.TAILS`; None means "official" under the official
      size rule, otherwise "pad".
    size_rule: one of `sizes.RULES`.

  Raises:
    errors.UserError: if `given` is not in `streaming.TAILS`.
  """
  if given is None:
    return "official" if size_rule == "official" else "pad"
  if given not in streaming.TAILS:
    raise errors.UserError(
      f"condition_tail must be one of {', '.join(streaming.TAILS)}, found "
      f"{given!r}"
    )
  return str(given)
