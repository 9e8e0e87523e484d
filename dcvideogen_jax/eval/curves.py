"""Plots the metrics of autoencoders against the number of the frame."""

import os
from collections.abc import Mapping
from typing import Any

from dcvideogen_jax import errors, files
from dcvideogen_jax.eval import clip_figures

_AXES = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
_AXES |= {"lpips": "LPIPS"}


def plot(
  path: str | os.PathLike[str], title: str, models: Mapping[str, Any]
) -> None:
  """Writes a curve per metric and autoencoder, averaged over the clips.

  Args:
    path: ends in .png.
    title: says of which clips the curves are.
    models: of `reconstruction_runs.summary`, by label.

  Raises:
    errors.UserError: if matplotlib is missing, or the file cannot be written.
  """
  try:
    from matplotlib import figure
  except ImportError as e:
    raise errors.UserError(
      f"the curves of {path} need matplotlib: pip install matplotlib"
    ) from e
  shown = [
    name
    for name in clip_figures.BY_FRAME
    if all(f"{name}_by_frame" in found for found in models.values())
  ]
  drawing = figure.Figure(figsize=(4.5 * len(shown), 3.6), layout="constrained")
  drawing.suptitle(title, fontsize=9)
  for name, axes in zip(
    shown, drawing.subplots(1, len(shown), squeeze=False)[0], strict=True
  ):
    for label, found in models.items():
      values = found[f"{name}_by_frame"]
      # A frame that is exact in all clips has no PSNR.
      heights = [float("nan") if x is None else x for x in values]
      marker = "." if len(heights) == 1 else None
      axes.plot(heights, label=label[-40:], linewidth=1.2, marker=marker)
    axes.set_xlabel("frame")
    axes.set_ylabel(_AXES[name])
    axes.grid(alpha=0.3)
  drawing.axes[0].legend(fontsize=7)
  with files.atomic(path) as temporary:
    drawing.savefig(temporary, dpi=150)
