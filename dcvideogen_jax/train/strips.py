"""Pictures of what an autoencoder does: original, reconstruction, error."""

import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors

ERROR_GAIN = 4
_GAP = 2


def strip(
  original: UInt8[np.ndarray, "b t h w 3"],
  output: UInt8[np.ndarray, "b t h w 3"],
  clips: int = 2,
  frames: int = 8,
) -> UInt8[np.ndarray, "H W 3"]:
  """Rows original / reconstruction / error for evenly spaced frames.

  The error is the absolute difference times `ERROR_GAIN`, clipped. Asked for
  more clips or frames than there are, it shows all of them.

  Raises:
    errors.UserError: if the two videos differ in shape.
  """
  if original.shape != output.shape:
    raise errors.UserError(
      f"a video of shape {original.shape} was reconstructed as {output.shape}"
    )
  t = original.shape[1]
  picked = np.linspace(0, t - 1, min(frames, t)).round().astype(int)
  difference = np.abs(original.astype(np.int16) - output)
  error = np.minimum(difference * ERROR_GAIN, 255).astype(np.uint8)
  rows = []
  for clip in range(min(clips, len(original))):
    for video in (original, output, error):
      padded = np.pad(
        video[clip, picked], ((0, 0), (0, _GAP), (0, _GAP), (0, 0))
      )
      rows.append(np.concatenate(list(padded), axis=1))
  return np.concatenate(rows, axis=0)[:-_GAP, :-_GAP]
