"""Video and latents of any length, which come in pieces of any length."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors, sharding

# What floats of a video may exceed -1 and 1 by: decoders overshoot.
_OVERSHOOT = 1.0


def require_video(piece: Any) -> Any:
  """A piece of a video on the host, if it is one.

  Raises:
    errors.UserError: unless it is uint8, or float and within [-1, 1] but for
      what decoders overshoot, and has 3 channels.
  """
  piece = sharding.to_host(piece)
  if piece.ndim == 5 and piece.shape[-1] != 3:
    raise errors.UserError(
      f"a video has 3 channels, the last axis, found {piece.shape}"
    )
  if piece.dtype == np.uint8 or not piece.size:
    return piece
  if not jnp.issubdtype(piece.dtype, jnp.floating):
    raise errors.UserError(
      "a video is uint8, 0 to 255, or float, -1 to 1, found " + str(piece.dtype)
    )
  lowest, highest = float(piece.min()), float(piece.max())
  if not (-1 - _OVERSHOOT <= lowest and highest <= 1 + _OVERSHOOT):
    raise errors.UserError(
      "a video of floats is within -1 to 1, found values from "
      f"{lowest:g} to {highest:g}"
    )
  return piece


def require_latents(piece: Any, module: Any) -> None:
  """Raises UserError unless latents have the channels of an autoencoder."""
  floats = jnp.issubdtype(piece.dtype, jnp.floating)
  if not floats or piece.shape[-1] != module.latent_channels:
    raise errors.UserError(
      f"latents are floats with {module.latent_channels} channels, the last "
      f"axis, found {piece.dtype} {piece.shape}"
    )


def regroup(
  pieces: Iterable[Any],
  frames: int,
  eager: bool = False,
  first: int | None = None,
) -> Iterator[tuple[np.ndarray, bool]]:
  """Pieces of `frames` frames each, the last maybe shorter, on the host.

  Args:
    pieces: `b t h w c`.
    frames: of a piece that is given.
    eager: give a piece as soon as its frames are there.
    first: frames of the first piece that is given; None is `frames`.

  Yields:
    (piece, whether it is known to be the last one)

  Raises:
    ValueError: if there are no frames or the pieces do not fit together.
  """
  waiting: list[np.ndarray] = []
  held, size, given = 0, first or frames, False
  for piece in pieces:
    piece = sharding.to_host(piece)
    if piece.ndim != 5:
      raise ValueError(f"expected pieces `b t h w c`, found {piece.shape}")
    expected = waiting[0] if waiting else piece
    if piece.shape[2:] != expected.shape[2:]:
      raise ValueError(
        f"frames change from {expected.shape[2:]} to {piece.shape[2:]}"
      )
    waiting.append(piece)
    held += piece.shape[1]
    # More than a chunk: what is held back tells that it is not the last.
    while held > size or (eager and held == size):
      joined = np.concatenate(waiting, axis=1)
      yield joined[:, :size], False
      waiting, held = [joined[:, size:]], held - size
      size, given = frames, True
  if not held and given:
    return
  if not held:
    raise ValueError("there are no frames")
  yield np.concatenate(waiting, axis=1), True
