"""Cost of a pass of the transformer against pixels and frames, fitted.

A pass in DC-AE-V's latents is compared with one in Wan's own: FLOPs of the
whole model at the sizes of the paper, and seconds of a few layers on the device
at hand, at small sizes.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tables
from benchmarks.gpu import cases
from dcvideogen_jax import files, flops
from dcvideogen_jax.models import wan_dit

Row = dict[str, Any]

# Name of a latent space -> variant, and the pixels and frames of a latent.
SPACES = {
  "DC-AE-V": ("dc-wan2.1-t2v-1.3b", 32, 4),
  "Wan": ("wan2.1-t2v-1.3b", 8, 4),
}
# Frames, rows and columns. The first list is counted, the second timed.
LARGE = (
  *((80, 480, 832), (80, 704, 1280), (80, 1088, 1920), (80, 2176, 3840)),
  *((160, 704, 1280), (320, 704, 1280), (640, 704, 1280)),
)
SMALL = (
  *((16, 128, 128), (16, 192, 192), (16, 256, 256), (16, 384, 384)),
  *((32, 192, 192), (64, 192, 192), (128, 192, 192)),
)
_TEXT_TOKENS = 512


def latents(space: str, size: Sequence[int]) -> tuple[int, int, int]:
  """Returns frames, rows and columns of the latents of a video.

  Wan's first latent frame holds one frame, so it takes 1 + 4k frames; as in the
  paper, 80 frames stand for 81 there.
  """
  _, spatial, temporal = SPACES[space]
  frames, height, width = size
  extra = 1 if space == "Wan" else 0
  found = (frames // temporal + extra, height // spatial, width // spatial)
  if min(found) < 1:
    raise ValueError(f"{size} is smaller than a latent of {space}")
  return found


def measure(
  sizes: Sequence[Sequence[int]],
  layers: int | None,
  timed: bool,
  fields: Mapping[str, Any] | None = None,
) -> list[Row]:
  """Counts, or times, a pass at each size in both spaces.

  Args:
    sizes: frames, height and width of each video.
    layers: of the transformer; None is all.
    timed: whether passes run on the default device; otherwise their FLOPs are
      counted, and nothing is compiled.
    fields: further fields of both transformers.

  Returns:
    A row for each space and size: "space", "frames", "height", "width",
    "tokens", "PFLOP" and, if timed, "s".
  """
  device = jax.devices()[0]
  dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
  rows = []
  for space, (variant, _, _) in SPACES.items():
    both = {"dtype": dtype, "param_dtype": dtype}
    more = {**(fields or {}), **({"layers": layers} if layers else {})}
    module = wan_dit.build(wan_dit.VARIANTS[variant], **both, **more)
    variables = None
    for size in sizes:
      shape = latents(space, size)
      arguments = (
        cases.shape(1, *shape, module.in_channels, dtype=jnp.float32),
        cases.shape(1, dtype=jnp.float32),
        cases.shape(1, _TEXT_TOKENS, module.text_width, dtype=dtype),
      )
      if variables is None:
        variables = jax.eval_shape(module.init, jax.random.key(0), *arguments)
      traced = jax.jit(module.apply).trace(variables, *arguments)
      row = dict(zip(("frames", "height", "width"), size, strict=True))
      tokens = math.prod(shape) // math.prod(module.patch)
      row = {"space": space, **row, "tokens": tokens}
      row["PFLOP"] = flops.count(traced.jaxpr.jaxpr) / 1e15
      if timed:
        drawn = cases.draw((variables, *arguments))
        program = traced.lower().compile()
        row["s"], _ = cases.timed(program, drawn)
      rows.append(row)
  return rows


def exponents(rows: Sequence[Row], value: str) -> list[Row]:
  """Fits value = a * x^p by least squares of logarithms.

  Args:
    rows: of `measure`.
    value: the column to fit, "PFLOP" or "s".

  Returns:
    A row for each space, with the exponent "against pixels", over the sizes
    with the first one's frames, and "against frames", over the sizes with the
    most common height and width.
  """
  found = []
  for space in dict.fromkeys(row["space"] for row in rows):
    own = [row for row in rows if row["space"] == space]
    pictures = [(row["height"], row["width"]) for row in own]
    common = max(pictures, key=pictures.count)
    series = {
      "pixels": [row for row in own if row["frames"] == own[0]["frames"]],
      "frames": [
        row
        for row, picture in zip(own, pictures, strict=True)
        if picture == common
      ],
    }
    row: Row = {"space": space, "of": value}
    for name, points in series.items():
      row[f"against {name}"] = _slope(
        [_amount(x, name) for x in points], [x[value] for x in points]
      )
    found.append(row)
  return found


def _amount(row: Row, name: str) -> int:
  return row["frames"] if name == "frames" else row["height"] * row["width"]


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def table(rows: Sequence[Row], fits: Sequence[Row]) -> str:
  """Formats the measurements and their exponents."""
  return f"{tables.markdown(rows)}\n\n{tables.markdown(fits)}"


def plot(rows: Sequence[Row], value: str, path: pathlib.Path) -> None:
  """Plots a column against the pixels of all frames, for each space, as PNG."""
  from matplotlib import figure

  picture = figure.Figure(figsize=(5, 3.4), layout="constrained")
  axes = picture.subplots()
  for space in dict.fromkeys(row["space"] for row in rows):
    own = [row for row in rows if row["space"] == space]
    pixels = [_amount(x, "pixels") * x["frames"] / 1e6 for x in own]
    axes.loglog(pixels, [x[value] for x in own], "o", label=space)
  axes.set_xlabel("million pixels of all frames")
  axes.set_ylabel("seconds of a pass" if value == "s" else "PFLOP of a pass")
  axes.legend(frameon=False)
  axes.spines[["top", "right"]].set_visible(False)
  with files.atomic(path) as file:
    picture.savefig(file, format="png", dpi=160)
