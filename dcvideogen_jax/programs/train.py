"""Trains what a config describes, and continues where it stopped.

  python -m launch.train --config=configs/tiny.py:autoencoder --workdir=DIR

The same command again continues an interrupted run. SIGTERM saves and ends
with exit code 143. DIR, which may begin with gs://, gets config.json,
checkpoints/, metrics.jsonl, tensorboard/ and strips/; `--config.a.b=...`
overrides a value of the config. `--profile=10-12` traces these steps into
DIR/profile, for xprof.

On several machines the same command, with the same DIR, starts on each, and has
--distributed (TPU pods, Slurm, Open MPI) or --coordinator=HOST:PORT
--processes=N --process=I.
"""

import contextlib
import sys

from absl import flags
from ml_collections import config_flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import common, distributed

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file and, after a colon, its argument."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run.", required=True
)
_EXPORT = flags.DEFINE_string(
  "export", None, "Directory for the EMA weights after the last step."
)
_PROFILE = flags.DEFINE_string(
  "profile", None, "Steps to trace for xprof, such as 10-12."
)
flags.mark_flag_as_required("config")

_TERMINATED = 128 + 15


def main(argv):
  """Trains, and exports if asked for."""
  del argv
  distributed.join(saves=True)
  import jax

  from dcvideogen_jax.tiny import evaluators
  from dcvideogen_jax.train import export, loop, profiling

  if _EXPORT.value and jax.process_count() > 1:
    raise errors.UserError(
      "--export is for one process: run launch.export after the training"
    )
  config = _CONFIG.value.to_dict()
  profile = range(0)
  if _PROFILE.value is not None:
    profile = profiling.parse(_PROFILE.value, config["steps"])
  with contextlib.ExitStack() as stack:
    # Made first: a name that cannot be is not to be found out after days.
    if _EXPORT.value and not files.is_remote(_EXPORT.value):
      stack.enter_context(common.output_directory(_EXPORT.value))
    if not loop.fit(config, _WORKDIR.value, evaluators.build(config), profile):
      sys.exit(_TERMINATED)
    if _EXPORT.value:
      export.export(_WORKDIR.value, _EXPORT.value)
      print(_EXPORT.value)
