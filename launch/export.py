"""Writes the weights of a training under their official PyTorch names.

  python -m launch.export --workdir=DIR --output=DIR/model

`--workdir` is that of `launch.train`; it may still be running. The result,
config.json and model.safetensors, is what every program takes as `--model`.
"""

from absl import flags

from dcvideogen_jax.train import export
from launch import _program

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the training.", required=True
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory to write.", required=True
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", list(export.DTYPES), "What weights are stored as."
)


def main(argv):
  del argv
  step = export.export(_WORKDIR.value, _OUTPUT.value, _DTYPE.value)
  print(f"step {step}: {_OUTPUT.value}")


if __name__ == "__main__":
  _program.run(main)
