"""What `DCVideoGen.generate` is given, checked and brought into form."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dcvideogen_jax import errors

Image = UInt8[np.ndarray, "h w 3"]

# A text, several, or their embeddings.
Prompt = str | Sequence[str] | Float[Array, "b s d"]

# Keys of jax's generator have 32 bits here; larger numbers would repeat.
_SEEDS = 2**32


def prompts(given: Prompt) -> tuple[list[str] | Any, int]:
  """A list of texts or an array of embeddings, and how many there are.

  Raises:
    errors.UserError: if it is neither.
  """
  if isinstance(given, str):
    return [given], 1
  if hasattr(given, "ndim"):
    if given.ndim != 3:
      raise errors.UserError(
        f"expected text embeddings (b, s, d), found {given.shape}"
      )
    return given, len(given)
  texts = list(given)
  if not texts or not all(isinstance(text, str) for text in texts):
    raise errors.UserError(f"expected prompts, found {given!r}")
  return texts, len(texts)


def image(given: Any, name: str) -> Image | None:
  """An image as an array; None stays None.

  Raises:
    errors.UserError: if it is not uint8 (h, w, 3), as RGB arrays and Pillow's
      images are.
  """
  if given is None:
    return None
  array = np.asarray(given)
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
    raise errors.UserError(
      f"{name} must be uint8 (h, w, 3), found {array.dtype} {array.shape}"
    )
  return array


def images(task: str, first: Any, last: Any, condition: Any) -> None:
  """Raises UserError unless they are what the task takes."""
  given = [x for x in (first, last, condition) if x is not None]
  if task == "t2v" and given:
    raise errors.UserError("this is a text-to-video model: it takes no image")
  if task == "i2v" and first is None and condition is None:
    raise errors.UserError("this is an image-to-video model: give an image")


def steps(given: Any) -> int:
  """The number of steps.

  Raises:
    errors.UserError: unless it is a positive whole number.
  """
  if isinstance(given, bool) or not isinstance(given, int) or given < 1:
    raise errors.UserError(f"steps must be at least 1, found {given!r}")
  return given


def guidance_scale(given: Any) -> float:
  """The scale of the guidance.

  Raises:
    errors.UserError: unless it is a finite number.
  """
  if not isinstance(given, int | float) or not math.isfinite(given):
    raise errors.UserError(
      f"guidance_scale must be a finite number, found {given!r}"
    )
  return float(given)


def noise(
  given: Any | None, seed: int | Sequence[int], shape: tuple[int, ...]
) -> tuple[Float[Array, "b t h w c"], list[int] | None]:
  """The noise, and the seeds it came from (None if it was given).

  Args:
    given: the noise itself, or None.
    seed: one for all samples or one each, from 0 up to 2^32 (not included).
    shape: of the noise, samples first.

  Raises:
    errors.UserError: if the noise or the seeds do not fit.
  """
  if given is not None:
    if np.shape(given) != shape:
      raise errors.UserError(
        f"the noise must have the shape {shape}, found {np.shape(given)}"
      )
    return jnp.asarray(given, jnp.float32), None
  try:
    seeds = [operator.index(seed)] * shape[0]
  except TypeError:
    seeds = [operator.index(s) for s in seed]
  if len(seeds) != shape[0]:
    raise errors.UserError(
      f"expected a seed per prompt, {shape[0]}, found {len(seeds)}"
    )
  if wrong := [s for s in seeds if not 0 <= s < _SEEDS]:
    raise errors.UserError(
      f"a seed is from 0 to {_SEEDS - 1}, found {wrong[0]}"
    )
  samples = [
    jax.random.normal(jax.random.key(s), shape[1:], jnp.float32) for s in seeds
  ]
  return jnp.stack(samples), seeds


def condition(
  given: Mapping[str, Array] | None, grid: tuple[int, int, int], channels: int
) -> Mapping[str, Array]:
  """A condition that was computed before; nothing for None.

  Args:
    given: as of `DCVideoGen.condition`.
    grid: latent frames, rows and columns.
    channels: of "extra".

  Raises:
    errors.UserError: if it is of another size or incomplete.
  """
  if given is None:
    return {}
  found = {name: tuple(x.shape) for name, x in given.items()}
  wanted = (1, *grid, channels)
  if set(found) != {"image", "extra"} or found["extra"] != wanted:
    raise errors.UserError(
      f'expected a condition of "image" and of "extra" {wanted}, found {found}'
    )
  return given
