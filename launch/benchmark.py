"""Times this project's code on the machine at hand.

  python -m launch.benchmark --what=reconstruct --output=out/reconstruct.json

encodes and decodes a clip with random weights in JAX and in plain PyTorch, each
alone in a process on two CPU cores (full size: 16 GiB of memory, minutes).

  python -m launch.benchmark --what=conv3d \\
    --output=dcvideogen_jax/ops/conv3d/measured.json

times the forms of the 3-D convolution on the default device and updates the
data by which `ops.conv3d` chooses.
"""

import json
import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.bench import conv3d, reconstruct
from dcvideogen_jax.models import dc_ae_v
from launch import _model, _program

_WHAT = flags.DEFINE_enum(
  "what", "reconstruct", ["reconstruct", "conv3d"], "What is timed."
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file.", required=True)
_REPEATS = flags.DEFINE_integer(
  "repeats", None, "Of each call. Unset: 1 for reconstruct, 5 for conv3d.", 1
)
_CONFIG = flags.DEFINE_string("config", "f32t4c32", _model.CONFIG_HELP)
_FRAMES = flags.DEFINE_integer("frames", 40, "Of the clip.", 1)
_HEIGHT = flags.DEFINE_integer("height", 128, "Of the clip, in pixels.", 1)
_WIDTH = flags.DEFINE_integer("width", 128, "Of the clip, in pixels.", 1)
_THREADS = flags.DEFINE_integer("threads", 2, "CPU cores to use.", 1)
_SIDES = flags.DEFINE_list("sides", [*reconstruct.SIDES], "Whom to time.")


def main(argv: Sequence[str]) -> None:
  """Measures, prints a table and writes the JSON."""
  del argv
  output = pathlib.Path(_OUTPUT.value)
  with _program.output_directory(output.parent):
    text = {"conv3d": _conv3d, "reconstruct": _reconstruct}[_WHAT.value](output)
    with files.atomic(output) as path:
      path.write_text(text)
  print(f"wrote {output}")


def _reconstruct(output):
  del output
  if unknown := sorted(set(_SIDES.value) - set(reconstruct.SIDES)):
    raise errors.UserError(
      f"--sides: expected some of {', '.join(reconstruct.SIDES)},"
      f" found {', '.join(unknown)}"
    )
  config = _model.config(_CONFIG.value)
  if isinstance(config, str):
    if config not in dc_ae_v.VARIANTS:
      raise errors.UserError(
        f"--config: expected one of {', '.join(dc_ae_v.VARIANTS)},"
        f" found {config!r}"
      )
    config = dc_ae_v.VARIANTS[config]
  report = reconstruct.compare(
    config,
    (1, _FRAMES.value, _HEIGHT.value, _WIDTH.value),
    sides=_SIDES.value,
    threads=_THREADS.value,
    repeats=_REPEATS.value or 1,
  )
  print(reconstruct.table(report))
  return json.dumps(report, indent=1) + "\n"


def _conv3d(output):
  """Replaces this platform's rows and keeps the others."""
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


if __name__ == "__main__":
  _program.run(main)
