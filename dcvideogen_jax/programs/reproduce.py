"""Trains the family of tiny models that ships, from nothing to a video.

  python -m launch.reproduce --workdir=DIR
  python -m launch.reproduce --workdir=DIR --ablation
  python -m launch.reproduce --workdir=DIR --streams

Each stage is one of our own programs; what it leaves in DIR is what the next
ones read. A stage that is done is not run again, and one that was interrupted
continues at its last checkpoint: start the same command again. DIR should lie
outside the checkout. DIR/scores gets what the base and the adapted models show
of 400 held-out scenes.

--ablation adapts the base of DIR again by each arm that AE-Adapt-V is compared
with, for each of --seeds; every run asks for held-out scenes as it goes.
DIR/ablation gets table.md, curves.png and results.json: the share of scenes
with colour, shape and motion right against the steps of all phases.

--streams trains the adapted model of DIR on with chunks and asks what long
videos show: DIR/streams gets a report for streams with and without a window,
and for the model of whole clips, at 1, 4 and 16 times the length of a clip.
"""

import json
import pathlib

from absl import flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.tiny import arms, family, stages

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of all stages.", required=True
)
_ABLATION = flags.DEFINE_bool("ablation", False, "Run the arms instead.")
_STREAMS = flags.DEFINE_bool(
  "streams", False, "Adapt for streaming and measure it instead."
)
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
  chain = family.STAGES
  if _ABLATION.value:
    if not (work / "base" / "model").exists():
      raise errors.UserError(
        f"{work} has no base/model: run launch.reproduce --until=base first"
      )
    chain = family.arm_stages(_SEEDS.value)
  if _STREAMS.value:
    chain = _streaming(work)
  if not _DRY_RUN.value:
    _describe_models(work)
  done = stages.run(chain, work, _UNTIL.value, _EXTRA.value, _DRY_RUN.value)
  if done and _ABLATION.value:
    print(arms.write(work, _SEEDS.value))
  elif done:
    print(f"{work}: everything is done")


def _streaming(work):
  """The stages.

  Raises:
    errors.UserError: if what they start from is not there.
  """
  if _ABLATION.value:
    raise errors.UserError("--ablation and --streams do not go together")
  made = "shipped/transformer_t2v"
  if not (work / made).exists():
    raise errors.UserError(
      f"{work} has no {made}: run launch.reproduce --until={made} first"
    )
  return family.STREAM_STAGES


def _describe_models(work):
  """Says where the parts of models are that will be asked."""
  for name in family.MODELS:
    folder = files.make_directory(work / "models" / name)
    with files.atomic(folder / "parts.json") as path:
      path.write_text(json.dumps(family.parts(str(work), name), indent=1))
