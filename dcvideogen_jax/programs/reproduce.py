"""Trains the family of tiny models that ships, from nothing to a video.

  dcvideogen reproduce --workdir=DIR

Each stage runs one of this project's programs on the results of earlier stages
in DIR. To continue after an interruption, start the same command again:
finished stages are skipped, and an interrupted training continues from its last
checkpoint. DIR should lie outside the checkout. DIR/scores gets the scores of
the base and the adapted models on 400 held-out scenes.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax import files

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder that holds the results of all stages.",
  required=True,
)
_UNTIL = flags.DEFINE_string(
  "until", None, "Name of the last stage to run. Unset: all stages run."
)
_EXTRA = flags.DEFINE_multi_string(
  "extra",
  [],
  "STAGE:FLAG, a flag to add to the commands of the stages of that name, such"
  " as base:--config.steps=50",
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Print the commands of the unfinished stages, and run none.",
)


def main(argv: Sequence[str]) -> None:
  """Runs the stages that are not done."""
  del argv
  from dcvideogen_jax.tiny import family

  if run(family.STAGES):
    print(f"{work()}: everything is done")


def work() -> pathlib.Path:
  """Returns the absolute path of --workdir."""
  return pathlib.Path(_WORKDIR.value).absolute()


def run(stages: Sequence[Any]) -> bool:
  """Runs those of `stages` that are not done, as the flags say.

  Returns:
    Whether all stages are done now.

  Raises:
    errors.UserError: outside a checkout, or if a flag names no stage.
  """
  from dcvideogen_jax.tiny import chain, family

  if not _DRY_RUN.value:
    # `evaluate tiny` finds the parts of each model by its parts.json.
    for name in family.MODELS:
      folder = files.make_directory(work() / "models" / name)
      with files.atomic(folder / "parts.json") as path:
        path.write_text(json.dumps(family.parts(str(work()), name), indent=1))
  return chain.run(stages, work(), _UNTIL.value, _EXTRA.value, _DRY_RUN.value)
