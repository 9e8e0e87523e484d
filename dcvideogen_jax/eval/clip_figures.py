"""Compares a clip with its reconstruction, by all metrics at once.

The figures are ready for JSON, so that a record can keep them.
"""

import base64
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float64, UInt8

from dcvideogen_jax.eval import fvd, images, lpips

# The metrics that have a value for each frame.
BY_FRAME = ("psnr", "ssim", "ms_ssim", "lpips")
# Frames of the windows of FVD, beside whole clips.
WINDOW = 16
# The sets of features that FVD compares, by their names in a record.
WHOLE, WINDOWS = "fvd", f"fvd_{WINDOW}"


class Loaded(Protocol):
  """A network with its weights, such as `networks.Network`."""

  @property
  def module(self) -> Any:
    """`models.lpips.LPIPS` or `models.i3d.I3D`."""

  @property
  def variables(self) -> Any:
    """Its weights."""


class Networks(NamedTuple):
  """The networks of the metrics that need one; None for no such metric.

  Attributes:
    lpips: of LPIPS.
    i3d: of FVD.
  """

  lpips: Loaded | None = None
  i3d: Loaded | None = None


NONE = Networks()


def by_frame(
  truth: UInt8[np.ndarray, "t h w 3"],
  output: UInt8[np.ndarray, "t h w 3"],
  network: Loaded | None = None,
) -> dict[str, list[float | None]]:
  """Returns the value of each frame, by metric.

  PSNR is None where a frame is exact. MS-SSIM is there if both sides have the
  pixels that it needs, LPIPS if there is a network.

  Raises:
    errors.UserError: if the frames are too small for the network.
  """
  psnr = images.psnr(truth, output).tolist()
  found = {
    "psnr": [x if math.isfinite(x) else None for x in psnr],
    "ssim": images.ssim(truth, output).tolist(),
  }
  if min(truth.shape[1:3]) >= images.SHORTEST_SIDE:
    found["ms_ssim"] = images.ms_ssim(truth, output).tolist()
  if network is not None:
    found["lpips"] = lpips.distance(
      network.module, network.variables, truth, output
    ).tolist()
  return found


def features(
  clip: UInt8[np.ndarray, "t h w 3"], network: Loaded
) -> dict[str, list[str]]:
  """Returns what FVD compares: of the whole clip, and of its windows.

  Each text is the bytes of one feature, float32. A clip that is shorter than a
  window has none.

  Raises:
    errors.UserError: if the clip is too short for I3D.
  """
  parts = [clip]
  if len(clip) > WINDOW:
    parts += fvd.windows(clip, WINDOW)
  module, variables = network.module, network.variables
  whole, *rest = (
    _text(fvd.features(module, variables, [part])) for part in parts
  )
  return {WHOLE: [whole], WINDOWS: [whole] if len(clip) == WINDOW else rest}


def distances(
  originals: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> dict[str, float | int | None]:
  """Returns the FVD of whole clips and of windows, each with its N.

  Args:
    originals: of `features`, one for each clip.
    others: the same of the reconstructions.

  Returns:
    "fvd" with "fvd_n", the number of clips, and "fvd_16" with "fvd_16_n", the
    number of windows; None for an FVD of fewer than two.
  """
  found: dict[str, float | int | None] = {}
  for kind in (WHOLE, WINDOWS):
    sides = [
      [_feature(text) for row in rows for text in row[kind]]
      for rows in (others, originals)
    ]
    count = len(sides[0])
    found[kind] = None
    if count > 1:
      found[kind] = fvd.distance(
        *(fvd.Moments.of(np.stack(side)) for side in sides)
      )
    found[f"{kind}_n"] = count
  return found


def _text(feature: Float64[np.ndarray, "1 c"]) -> str:
  # The logits are float32, so that nothing is lost.
  return base64.b64encode(feature[0].astype("<f4").tobytes()).decode()


def _feature(text: str) -> Float64[np.ndarray, " c"]:
  return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)
