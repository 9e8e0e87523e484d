"""Trains the model of a config, and continues an interrupted training.

  dcvideogen train --config=configs/tiny.py:autoencoder --workdir=DIR

The same command again continues an interrupted run. On SIGTERM the program
saves a checkpoint and exits with code 143. DIR may begin with gs://; it gets
config.json, checkpoints/, metrics.jsonl, tensorboard/ and strips/.
`--config.a.b=...` overrides a value of the config. `--profile=10-12` traces
these steps into DIR/profile, for xprof.

On several machines, start the same command with the same DIR on each, with
--distributed (TPU pods, Slurm, Open MPI) or with --coordinator=HOST:PORT
--processes=N --process=I.
"""

import contextlib
import sys

from absl import flags
from ml_collections import config_flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import common, distributed

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file of the training and, after a colon, its argument, such as"
  " configs/adapt.py:wan_t2v_1_3b,phase=lora. --config.KEY=VALUE overrides a"
  " value.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Directory for checkpoints and logs. A run that it holds is continued.",
  required=True,
)
_EXPORT = flags.DEFINE_string(
  "export",
  None,
  "Directory to export the EMA weights to after the last step. Unset: nothing"
  " is exported; `dcvideogen export` can do it later.",
)
_PROFILE = flags.DEFINE_string(
  "profile",
  None,
  "Steps to trace for xprof, counted from 1, such as 10 or 10-12. Unset: no"
  " trace.",
)
flags.mark_flag_as_required("config")


def main(argv):
  """Trains, and exports the result if --export is given.

  Raises:
    errors.UserError: if --export is given to more than one process.
  """
  del argv
  distributed.join(saves=True)
  import jax

  from dcvideogen_jax.tiny import evaluators
  from dcvideogen_jax.train import export, loop, profiling

  if _EXPORT.value and jax.process_count() > 1:
    raise errors.UserError(
      "--export is for one process: run `dcvideogen export` after training"
    )
  config = _CONFIG.value.to_dict()
  profile = range(0)
  if _PROFILE.value is not None:
    profile = profiling.parse(_PROFILE.value, config["steps"])
  with contextlib.ExitStack() as stack:
    # The directory is made first, so that a wrong name fails before the
    # training and not after it.
    if _EXPORT.value and not files.is_remote(_EXPORT.value):
      stack.enter_context(common.output_directory(_EXPORT.value))
    if not loop.fit(config, _WORKDIR.value, evaluators.build(config), profile):
      sys.exit(common.TERMINATED)
    if _EXPORT.value:
      export.export(_WORKDIR.value, _EXPORT.value)
      print(_EXPORT.value)
