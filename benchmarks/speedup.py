"""Plots DC-VideoGen's speed-up over Wan: by a roofline, and as published.

  python -m benchmarks.speedup --output=docs/speedup.png --target=h100

compares the transformers of 1.3B parameters alone, in bfloat16 on one device,
over 50 guided steps, with the measurements of arXiv 2509.25182 on an H100. The
target device is not needed, but jax's compiler for it is
(requirements-cuda.txt).
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from matplotlib import figure

from dcvideogen_jax import files, flops, sharding
from dcvideogen_jax.data import tokenize
from dcvideogen_jax.plan import compiled, hardware, roofline, sampling
from dcvideogen_jax.programs import common
from dcvideogen_jax.sample import placement, sizes

_OUTPUT = flags.DEFINE_string("output", None, "PNG to write.", required=True)
_TARGET = flags.DEFINE_string(
  "target",
  "h100",
  "The device: a GPU, such as h100, or a TPU slice, such as v5p:4x4x4, of which"
  " one chip counts.",
)

_BLUE, _ORANGE = "#3b6fb6", "#e08a3c"
STEPS = 50
BASE, DEEP = "wan2.1-t2v-1.3b", "dc-wan2.1-t2v-1.3b"


class Case(NamedTuple):
  """A size of video with the published times.

  Attributes:
    name: label in the plot.
    size: frames, height and width.
    base: minutes with Wan, as published.
    deep: minutes with DC-VideoGen, as published.
  """

  name: str
  size: sizes.Size
  base: float
  deep: float


CASES = (
  Case("480p", sizes.Size(80, 480, 832), 1.49, 0.24),
  Case("720p", sizes.Size(80, 704, 1280), 5.76, 0.70),
  Case("1080p", sizes.Size(80, 1088, 1920), 25.46, 2.27),
  Case("2160p", sizes.Size(80, 2176, 3840), 375.12, 25.41),
  Case("160 frames", sizes.Size(160, 704, 1280), 20.18, 1.99),
  Case("320 frames", sizes.Size(320, 704, 1280), 75.77, 6.03),
  Case("640 frames", sizes.Size(640, 704, 1280), 296.30, 20.86),
)


class Row(NamedTuple):
  """A case with the roofline's lower bounds.

  Attributes:
    case: the size and the published times.
    base: minutes with Wan, at least.
    deep: minutes with DC-VideoGen, at least.
  """

  case: Case
  base: float
  deep: float

  @property
  def predicted(self) -> float:
    """The speed-up by the roofline."""
    return self.base / self.deep

  @property
  def measured(self) -> float:
    """The published speed-up."""
    return self.case.base / self.case.deep


def rows(target: hardware.Target) -> list[Row]:
  """Computes a row for each of `CASES`, on one device of the target."""
  return [
    Row(case, *(_minutes(name, case.size, target) for name in (BASE, DEEP)))
    for case in CASES
  ]


def _minutes(variant: str, size: sizes.Size, target: hardware.Target) -> float:
  mesh = sharding.make_mesh({}, target.devices[:1])
  layout = placement.Layout(mesh, ((".*", "replicate"),))
  parts = placement.placed(sampling.parts(variant, jnp.bfloat16), layout)
  shape = sampling.latent_shape(parts, size)
  width = parts.transformer.module.text_width
  text = jax.ShapeDtypeStruct((1, tokenize.LENGTH, width), jnp.bfloat16)
  traced, arguments, passes = sampling.trace_step(
    parts, shape, {"text": text}, True, layout
  )
  work = flops.count(traced.jaxpr.jaxpr)
  # A lower bound of the memory traffic: weights, inputs and outputs.
  moved = passes * compiled.size(parts.transformer.variables)
  moved += compiled.size(arguments)
  step = roofline.estimate(target, roofline.Work(work, work, moved))
  return STEPS * step.total / 60


def table(rows: Sequence[Row]) -> str:
  """Formats a line for each case: minutes of 50 steps, and the speed-ups."""
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
  rows: Sequence[Row], device: str, path: str | os.PathLike[str]
) -> None:
  """Plots the speed-up by frame size and by number of frames, in two panels.

  Args:
    rows: from the function `rows`.
    device: name of the device, for the legend.
    path: the PNG to write.
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
  axes, names: Sequence[str], rows: Sequence[Row], device: str
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


def main(argv: Sequence[str]) -> None:
  """Prints the table and writes the plot."""
  del argv
  target = hardware.find(_TARGET.value)
  found = rows(target)
  print(table(found))
  draw(found, target.name, _OUTPUT.value)


if __name__ == "__main__":
  common.run(main)
