"""Compares frames with their reconstructions: videos, a sheet and metrics."""

import contextlib
import math
import os
import pathlib
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from dcvideogen_jax import files
from dcvideogen_jax.data import video
from dcvideogen_jax.eval import contact_sheet, images


class Comparison:
  """Receives frames and their reconstructions in order and writes files.

  Only the frames of the contact sheet stay in memory. Use it as a context
  manager: the files are complete once the context ends.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    title: str,
    *,
    frames: int,
    fps: float | None,
    crf: int = 18,
    comment: str | None = None,
  ):
    """Stores the settings; nothing is written yet.

    Args:
      directory: where the files go.
      title: title of the contact sheet.
      frames: number of frames expected; the contact sheet shows some of them,
        evenly spaced.
      fps: frames per second of the videos; None stands for one image, which is
        written as PNG.
      crf: quality of the videos; 0 is the best.
      comment: text stored in the videos' metadata.
    """
    self._directory = pathlib.Path(directory)
    self._title = title
    self._fps = fps
    self._video = {"crf": crf, "comment": comment}
    columns = min(frames, contact_sheet.COLUMNS)
    self._shown = set(np.linspace(0, frames - 1, columns).round().astype(int))
    self._columns: list[contact_sheet.Column] = []
    self._psnr: list[float] = []
    self._ssim: list[float] = []

  def __enter__(self) -> "Comparison":
    with contextlib.ExitStack() as stack:
      if self._fps is not None:
        self._writers = [
          stack.enter_context(
            video.VideoWriter(
              self._directory / f"{name}.mp4", fps=self._fps, **self._video
            )
          )
          for name in ("reconstruction", "side_by_side")
        ]
      self._stack = stack.pop_all()
    return self

  def __exit__(self, kind, value, traceback) -> bool | None:
    suppressed = self._stack.__exit__(kind, value, traceback)
    if kind is None:
      metrics = self.metrics()
      psnr, ssim = metrics["psnr"]["mean"], metrics["ssim"]["mean"]
      title = self._title + (
        ", exact" if psnr is None else f", PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"
      )
      path = self._directory / "contact_sheet.png"
      contact_sheet.write(path, title, self._columns, contact_sheet.COMPARISON)
    return suppressed

  def add(
    self,
    originals: UInt8[np.ndarray, "n h w 3"],
    reconstructions: UInt8[np.ndarray, "n h w 3"],
  ) -> None:
    """Appends frames to the videos, the metrics and the contact sheet.

    Raises:
      errors.UserError: if a file cannot be written.
    """
    first = len(self._psnr)
    self._psnr += images.psnr(originals, reconstructions).tolist()
    self._ssim += images.ssim(originals, reconstructions).tolist()
    both = np.concatenate([originals, reconstructions], axis=2)
    if self._fps is None:
      _write_png(self._directory / "reconstruction.png", reconstructions[0])
      _write_png(self._directory / "side_by_side.png", both[0])
    else:
      for writer, frames in zip(
        self._writers, (reconstructions, both), strict=True
      ):
        writer.write(frames)
    for i in range(len(originals)):
      if first + i in self._shown:
        title = f"frame {first + i}: {self._psnr[first + i]:.2f} dB"
        self._columns.append(
          contact_sheet.comparison(title, originals[i], reconstructions[i])
        )

  def metrics(self) -> dict[str, Any]:
    """Returns PSNR and SSIM per frame and their means, ready for JSON.

    The PSNR of a frame that was reconstructed exactly is infinite. It is
    reported as null and left out of the mean.
    """
    differing = [x for x in self._psnr if math.isfinite(x)]
    return {
      "frames": len(self._psnr),
      "psnr": {
        "unit": "dB",
        "mean": float(np.mean(differing)) if differing else None,
        "exact_frames": len(self._psnr) - len(differing),
        "per_frame": [
          round(x, 4) if math.isfinite(x) else None for x in self._psnr
        ],
      },
      "ssim": {
        "mean": float(np.mean(self._ssim)),
        "per_frame": [round(x, 6) for x in self._ssim],
      },
    }


def _write_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
  with files.atomic(path) as temporary:
    PIL.Image.fromarray(image).save(temporary)
