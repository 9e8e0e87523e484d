"""Times this project's code on the machine at hand.

  python -m launch.benchmark --what=reconstruct --output=out/reconstruct.json

encodes and decodes a clip with random weights in JAX and in plain PyTorch. Each
side runs alone in its process on two CPU cores (at full size it takes 16 GiB of
memory and minutes).

  python -m launch.benchmark --what=conv3d \\
    --output=dcvideogen_jax/ops/conv3d/measured.json

times the implementations of the 3-D convolution on the default device and
updates the table from which `ops.conv3d` chooses one.

  python -m launch.benchmark --what=load --output=out/load.json

loads a random checkpoint (2.8 GB, in a temporary directory) with this project
and with diffusers, and reports seconds and the memory relative to the size of
the files.

  python -m launch.benchmark --what=dit --output=out/dit.json

runs one step of the transformer of 1.3 billion parameters on 7800 tokens with
this project and with diffusers, on the same random weights (7 GiB of memory,
minutes).

  python -m launch.benchmark --what=attention --output=out/attention.json

times the implementations of attention on the default device, dense and with
block-causal masks, forward and backward. It reports milliseconds and TFLOP/s;
only pairs of tokens that the mask leaves visible count as work.

  python -m launch.benchmark --what=start --output=out/start.json

times imports and --help, and the first and second start of a sampling, with the
packages and the phases that take the time.

  python -m launch.benchmark --what=metrics --output=out/metrics.json

measures PSNR, SSIM and LPIPS of 16 clips with this project and with
torchmetrics and lpips, one clip at a time (minutes; needs these packages and
torchvision).
"""

import json
import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from benchmarks import (
  attention,
  conv3d,
  dit,
  load,
  metrics,
  reconstruct,
  start,
)
from dcvideogen_jax import errors, files
from dcvideogen_jax.models import dc_ae_v, wan_dit
from dcvideogen_jax.programs import common
from dcvideogen_jax.sample import model_names

_WHAT = flags.DEFINE_enum(
  "what",
  "reconstruct",
  ["reconstruct", "conv3d", "load", "dit", "attention", "start", "metrics"],
  "The benchmark to run.",
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "JSON file to write.", required=True
)
_REPEATS = flags.DEFINE_integer(
  "repeats",
  None,
  "Number of timed calls. Unset: 5 for conv3d, attention and start, otherwise"
  " 1.",
  1,
)
_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "The model to time. Unset: f32t4c32 for reconstruct, wan2.1-t2v-1.3b for"
  " load, which takes names only, and dc-wan2.1-t2v-1.3b for dit. "
  + common.CONFIG_HELP,
)
_FRAMES = flags.DEFINE_integer(
  "frames", 40, "Frames of the clips that reconstruct and metrics take.", 1
)
_HEIGHT = flags.DEFINE_integer(
  "height",
  None,
  "Height of the clips in pixels. Unset: 128 for reconstruct, 256 for metrics.",
  1,
)
_WIDTH = flags.DEFINE_integer(
  "width",
  None,
  "Width of the clips in pixels. Unset: 128 for reconstruct, 256 for metrics.",
  1,
)
_LATENTS = flags.DEFINE_list(
  "latents",
  ["20", "15", "26"],
  "Frames, rows and columns of the latents that dit takes. The default is 80"
  " frames of 480x832 pixels, encoded by f32t4c32.",
)
_TOKENS = flags.DEFINE_integer(
  "tokens",
  None,
  "Number of tokens for attention. Unset: 2048 on a CPU, otherwise 17600.",
  1,
)
_LAYERS = flags.DEFINE_integer(
  "layers",
  None,
  "Number of layers of the transformer for dit. Unset: that of the"
  " configuration.",
  1,
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  dit.DTYPES[0],
  dit.DTYPES,
  "Dtype of weights and computation for dit.",
)
_CLIPS = flags.DEFINE_integer("clips", 16, "Clips that metrics takes.", 1)
_THREADS = flags.DEFINE_integer(
  "threads", 2, "CPU cores that reconstruct, dit and metrics may use.", 1
)
_SIDES = flags.DEFINE_list(
  "sides",
  [*reconstruct.SIDES],
  "Implementations that reconstruct, load, dit and metrics time: jax is this"
  " project, torch is PyTorch, diffusers, or torchmetrics and lpips.",
)
# The flags that each benchmark reads, besides --output and --repeats.
_READS: dict[str, set[str]] = {
  "attention": {"tokens"},
  "conv3d": set(),
  "dit": {"config", "latents", "layers", "dtype", "threads", "sides"},
  "load": {"config", "sides"},
  "metrics": {"clips", "frames", "height", "width", "threads", "sides"},
  "reconstruct": {
    *("config", "frames", "height", "width", "threads", "sides"),
  },
  "start": set(),
}


def main(argv: Sequence[str]) -> None:
  """Runs the benchmark, prints a table and writes the JSON.

  Raises:
    errors.UserError: for a flag that the benchmark does not read.
  """
  del argv
  others = set().union(*_READS.values()) - _READS[_WHAT.value]
  common.refuse_flags(sorted(others), f"is not for --what={_WHAT.value}")
  output = pathlib.Path(_OUTPUT.value)
  with common.output_directory(output.parent):
    measure = {
      "attention": _attention,
      "conv3d": _conv3d,
      "dit": _dit,
      "load": _load,
      "metrics": _metrics,
      "reconstruct": _reconstruct,
      "start": _start,
    }
    text = measure[_WHAT.value](output)
    with files.atomic(output) as path:
      path.write_text(text)
  print(f"wrote {output}")


def _check_sides(known):
  if unknown := sorted(set(_SIDES.value) - set(known)):
    raise errors.UserError(
      f"--sides: expected some of {', '.join(known)},"
      f" found {', '.join(unknown)}"
    )


def _attention(output):
  del output
  platform = jax.default_backend()
  tokens, *others = attention.SHAPES[platform]
  shape = (_TOKENS.value or tokens, *others)
  rows = []
  for backward in (False, True):
    for blocks in attention.BLOCKS:
      row = attention.measure(
        shape, blocks, backward, attention.NAMES[platform], _REPEATS.value or 5
      )
      print(attention.table([row]), flush=True)
      rows.append(row)
  print(f"\n{shape}\n{attention.table(rows)}")
  device = jax.devices()[0].device_kind
  return json.dumps({"device": device, "rows": rows}, indent=1) + "\n"


def _start(output):
  del output
  report = start.measure(_REPEATS.value or 5)
  print(start.table(report))
  return json.dumps(report, indent=1) + "\n"


def _load(output):
  del output
  _check_sides(load.SIDES)
  report = load.compare(
    _CONFIG.value or "wan2.1-t2v-1.3b",
    sides=_SIDES.value,
    repeats=_REPEATS.value or 1,
  )
  print(load.table(report))
  return json.dumps(report, indent=1) + "\n"


def _dit(output):
  del output
  _check_sides(dit.SIDES)
  fields = _fields("dc-wan2.1-t2v-1.3b", wan_dit.VARIANTS)
  if _LAYERS.value:
    fields = {**fields, "layers": _LAYERS.value}
  try:
    frames, rows, columns = map(int, _LATENTS.value)
  except ValueError as e:
    raise errors.UserError(
      "--latents: expected frames, rows and columns as 20,15,26, found"
      f" {','.join(_LATENTS.value)}"
    ) from e
  report = dit.compare(
    fields,
    (frames, rows, columns),
    dtype=_DTYPE.value,
    sides=_SIDES.value,
    threads=_THREADS.value,
    repeats=_REPEATS.value or 1,
  )
  print(dit.table(report))
  return json.dumps(report, indent=1) + "\n"


def _fields(default, variants):
  """Returns the model's fields from --config: a variant's, or those given."""
  config = model_names.config(_CONFIG.value or default)
  if not isinstance(config, str):
    return config
  if config not in variants:
    raise errors.UserError(
      f"--config: expected one of {', '.join(variants)}, found {config!r}"
    )
  return variants[config]


def _reconstruct(output):
  del output
  _check_sides(reconstruct.SIDES)
  report = reconstruct.compare(
    _fields("f32t4c32", dc_ae_v.VARIANTS),
    (1, _FRAMES.value, _HEIGHT.value or 128, _WIDTH.value or 128),
    sides=_SIDES.value,
    threads=_THREADS.value,
    repeats=_REPEATS.value or 1,
  )
  print(reconstruct.table(report))
  return json.dumps(report, indent=1) + "\n"


def _metrics(output):
  del output
  _check_sides(metrics.SIDES)
  size = _HEIGHT.value or 256, _WIDTH.value or 256
  report = metrics.compare(
    (_CLIPS.value, _FRAMES.value, *size),
    sides=_SIDES.value,
    threads=_THREADS.value,
  )
  print(metrics.table(report))
  return json.dumps(report, indent=1) + "\n"


def _conv3d(output):
  """Replaces this platform's rows and keeps those of other platforms."""
  platforms = {}
  if output.exists():
    try:
      platforms = {**json.loads(output.read_text())["platforms"]}
    except (ValueError, KeyError, TypeError, OSError) as e:
      raise errors.UserError(
        f"--output={output} exists and is no table of measurements: {e!r}"
      ) from e
  rows = []
  for shape in conv3d.SHAPES:
    rows.append(conv3d.measure(shape, _REPEATS.value or 5))
    print(conv3d.table(rows[-1:]).splitlines()[-1], flush=True)
  print(conv3d.table(rows))
  return conv3d.dumps({**platforms, jax.default_backend(): rows})
