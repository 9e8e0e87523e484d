"""Trains the family of tiny models that ships, from nothing to a video.

  dcvideogen reproduce --workdir=DIR

Each stage is one of our own programs; what it leaves in DIR is what the next
ones read. A stage that is done is not run again, and one that was interrupted
continues at its last checkpoint: start the same command again. DIR should lie
outside the checkout. DIR/scores gets what the base and the adapted models show
of 400 held-out scenes.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax import files

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of all stages.", required=True
)
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


def main(argv: Sequence[str]) -> None:
  """Runs the stages that are not done."""
  del argv
  from dcvideogen_jax.tiny import family

  if run(family.STAGES):
    print(f"{work()}: everything is done")


def work() -> pathlib.Path:
  """The folder of the whole chain."""
  return pathlib.Path(_WORKDIR.value).absolute()


def run(stages: Sequence[Any]) -> bool:
  """Runs those stages that are not done, as the flags say.

  Returns:
    Whether all are done now.

  Raises:
    errors.UserError: outside a checkout, or if a flag names no stage.
  """
  from dcvideogen_jax.tiny import chain, family

  if not _DRY_RUN.value:
    # Where the parts of the models are that are asked for held-out scenes.
    for name in family.MODELS:
      folder = files.make_directory(work() / "models" / name)
      with files.atomic(folder / "parts.json") as path:
        path.write_text(json.dumps(family.parts(str(work()), name), indent=1))
  return chain.run(stages, work(), _UNTIL.value, _EXTRA.value, _DRY_RUN.value)
