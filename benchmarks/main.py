"""Times this project's code on the machine at hand.

Some benchmarks compare with PyTorch. Each side then runs alone in its process
on two CPU cores, with the same random weights, in turns (--rounds); medians,
their ratio, peak memory and the difference of the outputs are reported.

  python -m launch.benchmark --what=reconstruct --output=out/reconstruct.json

encodes and decodes a clip with DC-AE-V and with a plain torch model (at full
size it takes 16 GiB of memory and minutes).

  python -m launch.benchmark --what=dit --output=out/dit.json

runs a step of the transformer of 1.3 billion parameters on 7800 tokens, beside
diffusers (7 GiB of memory, minutes).

  python -m launch.benchmark --what=text --output=out/text.json

runs a block of UMT5-XXL's shape on 512 tokens, beside transformers.

  python -m launch.benchmark --what=sample --output=out/sample.json
  python -m launch.benchmark --what=train --output=out/train.json

sample with the tiny model that ships, and train a model of its shape.

  python -m launch.benchmark --what=load --output=out/load.json

loads a random checkpoint (2.8 GB, in a temporary directory), and reports the
memory relative to the size of the files.

The others time the default device:

  python -m launch.benchmark --what=attention --output=out/attention.json

times the implementations of attention, dense and with block-causal masks,
forward and backward. It reports milliseconds and TFLOP/s; only pairs of tokens
that the mask leaves visible count as work.

  python -m launch.benchmark --what=conv3d \\
    --output=dcvideogen_jax/ops/conv3d/measured.json

times the implementations of the 3-D convolution and updates the table from
which `ops.conv3d` chooses one.

  python -m launch.benchmark --what=cost --output=out/cost.json

counts and times passes of the transformer in DC-AE-V's latents and in Wan's, at
several sizes, and fits the exponents against pixels and frames.

  python -m launch.benchmark --what=start --output=out/start.json

times imports and --help, and the first and second start of a sampling, with the
packages and the phases that take the time.

  python -m launch.benchmark --what=metrics --output=out/metrics.json

measures PSNR, SSIM and LPIPS of 16 clips with this project and with
torchmetrics and lpips, one clip at a time (minutes; needs these packages and
torchvision).

Tables are printed and, except by conv3d, written beside the JSON as Markdown.
"""

import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from benchmarks import attention, conv3d, cost, metrics, sides, start
from benchmarks.tasks import (
  autoencoder,
  loading,
  sampling,
  text_encoder,
  training,
  transformer,
)
from dcvideogen_jax import errors, files
from dcvideogen_jax.models import dc_ae_v, umt5, wan_dit
from dcvideogen_jax.programs import common
from dcvideogen_jax.sample import model_names

# The flags that each benchmark reads, besides --output and --repeats.
_BESIDE = {"sides", "threads", "rounds", "warm_up"}
_READS: dict[str, set[str]] = {
  "reconstruct": _BESIDE | {"config", "frames", "height", "width"},
  "dit": _BESIDE | {"config", "latents", "layers", "dtype"},
  "text": _BESIDE | {"layers", "tokens", "dtype"},
  "sample": _BESIDE,
  "train": _BESIDE,
  "load": _BESIDE - {"warm_up"} | {"config"},
  "attention": {"tokens"},
  "conv3d": set(),
  "cost": {"layers"},
  "metrics": {"clips", "frames", "height", "width", "threads", "sides"},
  "start": set(),
}
_WHAT = flags.DEFINE_enum(
  "what", "reconstruct", [*_READS], "The benchmark to run."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "JSON file to write.", required=True
)
_REPEATS = flags.DEFINE_integer(
  "repeats",
  None,
  "Number of timed calls, in each process where there are two sides. Unset: 5"
  " for conv3d, attention and start, otherwise 1.",
  1,
)
_ROUNDS = flags.DEFINE_integer(
  "rounds",
  1,
  "Number of processes of each side; the sides take turns.",
  1,
)
_WARM_UP = flags.DEFINE_bool(
  "warm_up", True, "Run once in each process before calls are timed."
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
_CLIPS = flags.DEFINE_integer("clips", 16, "Clips that metrics takes.", 1)
_LATENTS = flags.DEFINE_list(
  "latents",
  ["20", "15", "26"],
  "Frames, rows and columns of the latents that dit takes. The default is 80"
  " frames of 480x832 pixels, encoded by f32t4c32.",
)
_TOKENS = flags.DEFINE_integer(
  "tokens",
  None,
  "Number of tokens for attention and text. Unset: 512 for text; for attention"
  " 2048 on a CPU, otherwise 17600.",
  1,
)
_LAYERS = flags.DEFINE_integer(
  "layers",
  None,
  "Number of layers for dit, text and cost. Unset: that of the configuration"
  " for dit, 1 for text and the timed passes of cost.",
  1,
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  transformer.DTYPES[0],
  transformer.DTYPES,
  "Dtype of weights and computation for dit and text.",
)
_THREADS = flags.DEFINE_integer(
  "threads", 2, "CPU cores that each of two sides may use.", 1
)
_SIDES = flags.DEFINE_list(
  "sides",
  [*sides.SIDES],
  "The sides to time: jax is this project, torch is PyTorch, diffusers and"
  " transformers, or torchmetrics and lpips.",
)
# A model of the shape of the tiny one that ships, whose steps `train` times.
_TINY = {
  **{"layers": 6, "width": 192, "heads": 6, "ffn_width": 768},
  **{"text_width": 64, "in_channels": 64, "out_channels": 64},
  "patch": (1, 1, 1),
}


def main(argv: Sequence[str]) -> None:
  """Runs the benchmark, prints its tables and writes them and the JSON.

  Raises:
    errors.UserError: for a flag that the benchmark does not read.
  """
  del argv
  others = set().union(*_READS.values()) - _READS[_WHAT.value]
  common.refuse_flags(sorted(others), f"is not for --what={_WHAT.value}")
  if unknown := sorted(set(_SIDES.value) - set(sides.SIDES)):
    raise errors.UserError(
      f"--sides: expected some of {', '.join(sides.SIDES)},"
      f" found {', '.join(unknown)}"
    )
  output = pathlib.Path(_OUTPUT.value)
  with common.output_directory(output.parent):
    measure = {
      "attention": _attention,
      "conv3d": _conv3d,
      "cost": _cost,
      "dit": _dit,
      "load": _load,
      "metrics": _metrics,
      "reconstruct": _reconstruct,
      "sample": _sample,
      "start": _start,
      "text": _text,
      "train": _train,
    }
    text, table = measure[_WHAT.value](output)
    print(table)
    if _WHAT.value != "conv3d":  # Its JSON is a file of the package.
      with files.atomic(output.with_suffix(".md")) as path:
        path.write_text(table + "\n", encoding="utf-8")
    with files.atomic(output) as path:
      path.write_text(text, encoding="utf-8")
  print(f"wrote {output}")


def _json(report: Any) -> str:
  return json.dumps(report, indent=1) + "\n"


def _compare(task, request, told=None, more=(), **options):
  """Returns the JSON and the table of a comparison.

  Args:
    task, request: as for `sides.compare`.
    told: what to add to the report.
    more: further rows of the table.
    **options: of `sides.compare`.
  """
  options = {"warm_up": _WARM_UP.value, **options}
  report = sides.compare(
    task,
    request,
    sides=_SIDES.value,
    threads=_THREADS.value,
    repeats=_REPEATS.value or 1,
    rounds=_ROUNDS.value,
    **options,
  )
  report |= told or {}
  return _json(report), sides.table(report, more)


def _reconstruct(output):
  del output
  clip = (1, _FRAMES.value, _HEIGHT.value or 128, _WIDTH.value or 128)
  config = _fields("f32t4c32", dc_ae_v.VARIANTS)
  request = autoencoder.request(config, clip)
  return _compare(
    "autoencoder", request, {"clip": [*clip], "config": request["config"]}
  )


def _dit(output):
  del output
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
  size = (frames, rows, columns)
  request = transformer.request(fields, size, _DTYPE.value)
  told = ("fields", "latents", "dtype", "tokens", "weight_bytes")
  return _compare("transformer", request, {k: request[k] for k in told})


def _text(output):
  del output
  request = text_encoder.request(
    umt5.VARIANTS["umt5_xxl"],
    _LAYERS.value or 1,
    _TOKENS.value or 512,
    _DTYPE.value,
  )
  told = ("fields", "tokens", "dtype")
  return _compare("text_encoder", request, {k: request[k] for k in told})


def _sample(output):
  del output
  request = sampling.request()
  return _compare("sampling", request, request)


def _train(output):
  del output
  request = training.request(_TINY, 32, (4, 2, 2))
  told = ("fields", "latents", "tokens")
  return _compare("training", request, {k: request[k] for k in told})


def _load(output):
  del output
  variant = _CONFIG.value or "wan2.1-t2v-1.3b"
  if variant not in wan_dit.VARIANTS:
    raise errors.UserError(
      f"--config: expected one of {', '.join(wan_dit.VARIANTS)}, found"
      f" {variant!r}"
    )
  with tempfile.TemporaryDirectory() as folder:
    size = loading.write(pathlib.Path(folder), wan_dit.VARIANTS[variant])

    def grown(side):
      pairs = zip(side["peak_bytes"], side["loaded_bytes"], strict=True)
      return max(peak - loaded for peak, loaded in pairs) / size

    return _compare(
      "loading",
      {"directory": folder},
      {"variant": variant, "file_bytes": size},
      (("memory / files", grown),),
      warm_up=False,
    )


def _metrics(output):
  del output
  size = _HEIGHT.value or 256, _WIDTH.value or 256
  report = metrics.compare(
    (_CLIPS.value, _FRAMES.value, *size),
    sides=_SIDES.value,
    threads=_THREADS.value,
  )
  return _json(report), metrics.table(report)


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
  device = jax.devices()[0].device_kind
  return _json({"device": device, "rows": rows}), attention.table(rows)


def _cost(output):
  counted = cost.measure(cost.LARGE, None, timed=False)
  timed = cost.measure(cost.SMALL, _LAYERS.value or 1, timed=True)
  fits = [*cost.exponents(counted, "PFLOP"), *cost.exponents(timed, "s")]
  cost.plot(counted, "PFLOP", output.with_suffix(".flop.png"))
  cost.plot(timed, "s", output.with_suffix(".seconds.png"))
  report = {"counted": counted, "timed": timed, "exponents": fits}
  return _json(report), cost.table([*counted, *timed], fits)


def _start(output):
  del output
  report = start.measure(_REPEATS.value or 5)
  return _json(report), start.table(report)


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
  text = conv3d.dumps({**platforms, jax.default_backend(): rows})
  return text, conv3d.table(rows)
