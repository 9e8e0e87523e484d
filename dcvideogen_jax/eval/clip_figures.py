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
# Most groups of clips of a jackknife.
_GROUPS = 20


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


class Pieces:
  """Figures of a clip whose frames come in pieces.

  The values of frames are those of `by_frame` of the whole clip. Of FVD there
  are windows only, since I3D takes a whole clip at once.
  """

  def __init__(self, networks: Networks = NONE):
    """Starts with no frames.

    Args:
      networks: of the metrics that need one.
    """
    self._networks = networks
    self._values: dict[str, list[float | None]] = {}
    self._sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    self._features: tuple[list[str], list[str]] = ([], [])
    self._shape = (0, 0, 0, 0)

  def add(
    self,
    truth: UInt8[np.ndarray, "t h w 3"],
    output: UInt8[np.ndarray, "t h w 3"],
  ) -> None:
    """Measures the next frames.

    Args:
      truth: of the original, one or more.
      output: the same frames of the reconstruction.

    Raises:
      errors.UserError: if the frames are too small for a network.
    """
    found = by_frame(truth, output, self._networks.lpips)
    for name, values in found.items():
      self._values.setdefault(name, []).extend(values)
    self._shape = (self._shape[0] + len(truth), *truth.shape[1:])
    if (network := self._networks.i3d) is None:
      return
    for frames, side, features in zip(
      (truth, output), self._sides, self._features, strict=True
    ):
      side.extend(frames)
      while len(side) >= WINDOW:
        window = np.stack(side[:WINDOW])
        del side[:WINDOW]
        features.append(feature_text(window, network))

  def rows(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the features of the original, and all figures and "shape"."""
    row = {"shape": [*self._shape], **self._values}
    if self._networks.i3d is None:
      return {}, row
    original, other = ({WINDOWS: found} for found in self._features)
    return original, row | other


def features(
  clip: UInt8[np.ndarray, "t h w 3"], network: Loaded, windows: bool = True
) -> dict[str, list[str]]:
  """Returns what FVD compares: of the whole clip, and of its windows.

  Each text is the bytes of one feature, float32. A clip that is shorter than a
  window has none.

  Args:
    clip: the frames.
    network: I3D.
    windows: whether the windows are asked for.

  Raises:
    errors.UserError: if the clip is too short for I3D.
  """
  if not windows:
    return {WHOLE: [feature_text(clip, network)]}
  parts = [clip]
  if len(clip) > WINDOW:
    parts += fvd.windows(clip, WINDOW)
  whole, *rest = (feature_text(part, network) for part in parts)
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
    if not all(kind in row for row in others):
      continue
    pairs = [
      (to_features(row[kind]), to_features(original[kind]))
      for row, original in zip(others, originals, strict=True)
    ]
    found[kind] = _distance(pairs)
    found[f"{kind}_error"] = standard_error(pairs)
    found[f"{kind}_n"] = sum(len(other) for other, _ in pairs)
  return found


# Features of the windows of a clip: of its reconstruction and of the original.
_Pair = tuple[Float64[np.ndarray, "_ _"], Float64[np.ndarray, "_ _"]]


def standard_error(pairs: Sequence[_Pair]) -> float | None:
  """Returns the standard error of FVD by a jackknife over the clips.

  The clips are dealt into at most 20 groups. FVD is computed without each of
  them. Values without a group all have the bias of fewer clips, so only their
  spread is used.

  Args:
    pairs: the features of each clip's reconstruction and original.

  Returns:
    None for fewer than three clips.
  """
  groups = min(len(pairs), _GROUPS)
  if groups < 3:
    return None
  values = [
    _distance([x for i, x in enumerate(pairs) if i % groups != group])
    for group in range(groups)
  ]
  known = [x for x in values if x is not None]
  if len(known) < groups:
    return None
  return float(np.sqrt((groups - 1) * np.var(known)))


def _distance(pairs: Sequence[_Pair]) -> float | None:
  """Returns the FVD; None for fewer than two features."""
  # The features of a clip without windows have no width.
  filled = [pair for pair in pairs if len(pair[0])]
  if sum(len(other) for other, _ in filled) < 2:
    return None
  sides = (np.concatenate(side) for side in zip(*filled, strict=True))
  return fvd.distance(*map(fvd.Moments.of, sides))


def feature_text(clip: UInt8[np.ndarray, "t h w 3"], network: Loaded) -> str:
  """Returns the bytes of a clip's logits, float32, so that nothing is lost.

  Args:
    clip: the frames.
    network: I3D.

  Raises:
    errors.UserError: if the clip is too short for I3D.
  """
  feature = fvd.features(network.module, network.variables, [clip])
  return base64.b64encode(feature[0].astype("<f4").tobytes()).decode()


def to_features(texts: Sequence[str]) -> Float64[np.ndarray, "n c"]:
  """Returns the features that texts of `feature_text` hold."""
  raw = b"".join(map(base64.b64decode, texts))
  width = len(raw) // 4 // len(texts) if texts else 0
  rows = np.frombuffer(raw, "<f4").reshape(len(texts), width)
  return rows.astype(np.float64)
