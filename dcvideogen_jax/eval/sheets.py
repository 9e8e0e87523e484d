"""Contact sheets of many videos, as plain arrays."""

import numpy as np
from jaxtyping import UInt8

_GAP = 2
_PAPER = 224


def sheet(
  videos: UInt8[np.ndarray, "n t h w 3"], frames: int = 4, across: int = 4
) -> UInt8[np.ndarray, "H W 3"]:
  """Some frames of each video, evenly spaced from the first to the last.

  Frames of a video lie side by side, videos `across` in a row. Asked for more
  frames than there are, it shows all of them.

  Raises:
    ValueError: if there is no video.
  """
  n, t = videos.shape[:2]
  if not n:
    raise ValueError("there are no videos to show")
  picked = np.linspace(0, t - 1, min(frames, t)).round().astype(int)
  strips = [np.concatenate(list(video[picked]), axis=1) for video in videos]
  blank = np.full_like(strips[0], _PAPER)
  across = min(across, n)
  strips += [blank] * (-n % across)
  edge = ((0, _GAP), (0, _GAP), (0, 0))
  padded = [np.pad(s, edge, constant_values=_PAPER) for s in strips]
  rows = [
    np.concatenate(padded[i : i + across], axis=1)
    for i in range(0, len(padded), across)
  ]
  return np.concatenate(rows)[:-_GAP, :-_GAP]
