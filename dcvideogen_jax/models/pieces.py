"""Checks and regroups the pieces in which long videos and latents arrive."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors, sharding

# Decoders overshoot: float pixels may exceed [-1, 1] by this much.
_OVERSHOOT = 1.0


def require_video(piece: Any) -> Any:
  """Returns a piece of a video in host memory, after checking its values.

  Raises:
    errors.UserError: if the piece does not have 3 channels, or is neither uint8
      nor float within [-1, 1] up to the overshoot of decoders.
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
  """Checks that latents are floats with the channels of an autoencoder.

  Raises:
    errors.UserError: if they are not.
  """
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
  noun: str = "frames",
) -> Iterator[tuple[np.ndarray, bool]]:
  """Regroups pieces into pieces of `frames` frames each, in host memory.

  The last piece may be shorter.

  Args:
    pieces: arrays (b, t, h, w, c) of any number of frames, in order.
    frames: frames of a piece that is yielded.
    eager: whether to yield a piece as soon as its frames have arrived, before
      it is known whether another follows.
    first: frames of the first piece that is yielded; None for `frames`.
    noun: what the pieces hold, for error messages.

  Yields:
    (piece, whether it is known to be the last one)

  Raises:
    ValueError: if there are no frames, or the pieces do not have five axes and
      the same height, width and channels.
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
        f"{noun} change from {expected.shape[2:]} to {piece.shape[2:]}"
      )
    waiting.append(piece)
    held += piece.shape[1]
    # Unless eager, one frame more than a piece is held: it shows that the piece
    # is not the last.
    while held > size or (eager and held == size):
      joined = np.concatenate(waiting, axis=1)
      yield joined[:, :size], False
      waiting, held = [joined[:, size:]], held - size
      size, given = frames, True
  if not held and given:
    return
  if not held:
    raise ValueError(f"there are no {noun}")
  yield np.concatenate(waiting, axis=1), True
