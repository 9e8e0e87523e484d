"""Trains the family of tiny models that ships, from nothing to a video.

  python -m launch.reproduce --workdir=DIR
  python -m launch.reproduce --workdir=DIR --ablation

Each stage is one of our own programs; what it leaves in DIR is what the next
ones read. A stage that is done is not run again, and one that was interrupted
continues at its last checkpoint: start the same command again. DIR should lie
outside the checkout.

--ablation adapts the base of DIR again by each arm that AE-Adapt-V is compared
with, for each of --seeds; every run asks for held-out scenes as it goes.
DIR/ablation gets table.md, curves.png and results.json: the share of scenes
with colour, shape and motion right against the steps of all phases.
"""

import pathlib

from absl import flags

from dcvideogen_jax import errors
from launch import _arms, _family, _program, _stages

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of all stages.", required=True
)
_ABLATION = flags.DEFINE_bool("ablation", False, "Run the arms instead.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the arms.")
_UNTIL = flags.DEFINE_string("until", None, "The last stage to run.")
_EXTRA = flags.DEFINE_multi_string(
  "extra",
  [],
  "STAGE:FLAG is added to the commands of stages of that name, such as"
  " base:--config.steps=50.",
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print the commands of what is left to do."
)


def main(argv):
  """Runs the stages that are not done."""
  del argv
  work = pathlib.Path(_WORKDIR.value).absolute()
  stages = _family.STAGES
  if _ABLATION.value:
    if not (work / "base" / "model").exists():
      raise errors.UserError(
        f"{work} has no base/model: run launch.reproduce --until=base first"
      )
    stages = _family.arm_stages(_SEEDS.value)
  done = _stages.run(stages, work, _UNTIL.value, _EXTRA.value, _DRY_RUN.value)
  if done and _ABLATION.value:
    print(_arms.write(work, _SEEDS.value))
  elif done:
    print(f"{work}: everything is done")


if __name__ == "__main__":
  _program.run(main)
