"""Trains what a config describes, and continues where it stopped.

  python -m launch.train --config=configs/tiny.py:autoencoder --workdir=DIR

The same command again continues an interrupted run. SIGTERM saves and ends
with exit code 143. DIR gets config.json, checkpoints/, metrics.jsonl,
tensorboard/ and strips/; `--config.a.b=...` overrides a value of the config.
"""

import sys

from absl import flags
from ml_collections import config_flags

from dcvideogen_jax.train import export, loop
from launch import _program

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file and, after a colon, its argument."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run.", required=True
)
_EXPORT = flags.DEFINE_string(
  "export", None, "Directory for the averaged weights after the last step."
)
flags.mark_flag_as_required("config")

_TERMINATED = 128 + 15


def main(argv):
  del argv
  if not loop.fit(_CONFIG.value.to_dict(), _WORKDIR.value):
    sys.exit(_TERMINATED)
  if _EXPORT.value:
    export.export(_WORKDIR.value, _EXPORT.value)
    print(_EXPORT.value)


if __name__ == "__main__":
  _program.run(main)
