"""The table and the picture of `plan.speedup`."""

import os
from collections.abc import Sequence

from matplotlib import figure

from dcvideogen_jax import files
from dcvideogen_jax.plan import speedup

_BLUE, _ORANGE = "#3b6fb6", "#e08a3c"


def table(rows: Sequence[speedup.Row]) -> str:
  """A line for each case, with minutes of 50 steps and the ratios."""
  lines = [
    "              Wan, minutes        DC-VideoGen         times faster",
    "              at least measured   at least measured   predicted measured",
  ]
  for row in rows:
    case = row.case
    lines.append(
      f"{case.name:12} {row.base:9.2f} {case.base:8.2f}  {row.deep:9.3f} "
      f"{case.deep:8.2f}   {row.predicted:9.1f} {row.measured:8.1f}"
    )
  return "\n".join(lines)


def draw(
  rows: Sequence[speedup.Row], device: str, path: str | os.PathLike[str]
) -> None:
  """Writes two panels as PNG: over the size, and over the number of frames.

  Args:
    rows: of `speedup.rows`.
    device: that they are of.
    path: of the file.
  """
  sizes = [row for row in rows if row.case.size.frames == 80]
  frames = [row for row in rows if row.case.name == "720p"]
  frames += [row for row in rows if row.case.size.frames > 80]
  picture = figure.Figure(figsize=(8, 3.2), layout="constrained")
  left, right = picture.subplots(1, 2, sharey=True)
  _panel(left, [row.case.name for row in sizes], sizes, device)
  left.set_title("80 frames")
  left.set_ylabel("times faster than Wan 2.1")
  names = [str(row.case.size.frames) for row in frames]
  _panel(right, names, frames, device)
  right.set_title("frames of 704x1280")
  left.legend(frameon=False, loc="upper left")
  with files.atomic(path) as file:
    picture.savefig(file, format="png", dpi=160)


def _panel(
  axes, names: Sequence[str], rows: Sequence[speedup.Row], device: str
) -> None:
  at = range(len(rows))
  for shift, label, colour, values in (
    (-0.2, f"roofline of one {device}", _BLUE, [row.predicted for row in rows]),
    (0.2, "arXiv 2509.25182, H100", _ORANGE, [row.measured for row in rows]),
  ):
    bars = axes.bar(
      [x + shift for x in at], values, 0.38, label=label, color=colour
    )
    axes.bar_label(bars, fmt="%.1f", fontsize=8)
  axes.set_xticks(at, names)
  axes.spines[["top", "right"]].set_visible(False)
