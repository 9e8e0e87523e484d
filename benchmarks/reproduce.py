"""Trains the family of tiny models that ships, or runs experiments with it.

  python -m launch.reproduce --workdir=DIR
  python -m launch.reproduce --workdir=DIR --ablation
  python -m launch.reproduce --workdir=DIR --streams
  python -m launch.reproduce --workdir=DIR --recipe
  python -m launch.reproduce --workdir=DIR --distillation
  python -m launch.reproduce --workdir=DIR --transfer

Each stage runs one of the project's programs and writes to DIR, from which
later stages read. To continue after an interruption, start the same command
again: stages that are done are skipped, and an interrupted one continues at its
last checkpoint. DIR should lie outside the checkout. The results are in
DIR/scores: how often the base and the adapted models get 400 held-out scenes
right.

--ablation adapts the base in DIR again by AE-Adapt-V and by each alternative,
once for each of --seeds. During training each run is scored on held-out scenes.
DIR/ablation gets table.md, curves.png and results.json: the share of scenes
whose colour, shape and motion are right, against the steps of all phases.

--streams trains the adapted model in DIR further with chunks and scores long
videos. DIR/streams gets a report for streams with and without a window, and for
the model of whole clips, at 1, 4 and 16 times the length of a clip. Then it
distils the streaming model to a few steps, DIR/shipped/few_t2v_stream, and
scores its streams too.

--recipe trains the autoencoder that ships further, by each part of DC-AE-V's
recipe, with the clips of the stages `clips` and `heldout_clips`. DIR/recipe
gets table.md: what each part changes on held-out clips.

--distillation needs nothing in DIR: it distils the models that ship, by each
kind and once for each of --seeds, and asks them held-out prompts.
DIR/distillation gets table.md: right answers and the spread over noise.

--transfer distils the base in DIR, and merges its few-step LoRA into the
adapted model. DIR/transfer gets table.md: right answers of both.
"""

from collections.abc import Sequence

from absl import flags

from benchmarks import (
  ablation,
  autoencoder_ablation,
  distillation,
  transfer,
)
from dcvideogen_jax import errors
from dcvideogen_jax.programs import reproduce
from dcvideogen_jax.tiny import chain, family

_ABLATION = flags.DEFINE_bool(
  "ablation", False, "Run the ablation, from the base in --workdir."
)
_STREAMS = flags.DEFINE_bool(
  "streams",
  False,
  "Adapt the model in --workdir for streaming, and measure its streams.",
)
_RECIPE = flags.DEFINE_bool(
  "recipe", False, "Run the ablation of the autoencoder's training."
)
_DISTILLATION = flags.DEFINE_bool(
  "distillation", False, "Distil the models that ship, and measure them."
)
_TRANSFER = flags.DEFINE_bool(
  "transfer", False, "Distil the base in --workdir for the adapted model."
)
_RECIPE_STEPS = flags.DEFINE_integer(
  "recipe_steps", 300, "Steps of each training of --recipe.", lower_bound=1
)
_SEEDS = flags.DEFINE_list(
  "seeds",
  ["0", "1", "2"],
  "Seeds of the trainings of --ablation, --recipe and --distillation.",
)


def _streamed(name: str, *more: str) -> chain.Stage:
  return family.evaluation(
    f"streams/{name}",
    "causal",
    *("--prompts=96", *more),
    program="benchmarks.streams",
    group="streams",
  )


_WINDOW = ("--window=1", "--sink=1")
# The adapted model is trained further with chunks of half a clip. Then streams
# and the model of whole clips are scored at 1, 4 and 16 times a clip's length.
# With a window of one chunk and no sink, positions are those of training.
STREAM_STAGES = (
  chain.train(
    "causal",
    f"{family.T2V},phase=lora,causal=teacher",
    *family.LATENTS,
    *family.DEEP,
    "--config.start.weights={work}/lora/model",
    "--config.steps=2000",
  ),
  _streamed("window", "--window=1"),
  _streamed("sink", *_WINDOW),
  _streamed("all", "--lengths=1,4"),
  # A few very long videos, to measure speed and memory.
  _streamed("long", *_WINDOW, "--prompts=8", "--lengths=1,256"),
  *(
    family.semantic(
      f"streams/whole_{frames}",
      "lora",
      frames,
      "--prompts=96",
      "--at_end",
      group="streams",
    )
    for frames in (16, 64, 256)
  ),
  # The streaming model in a few steps. It learns from its own chunks, which the
  # model of whole clips judges.
  *family.few(
    "t2v_stream",
    "causal/model",
    *family.LATENTS,
    causal="teacher",
    few_steps=("--config.distil.teacher={work}/shipped/transformer_t2v",),
  ),
  chain.Stage(
    "streams/few",
    "streams/few.json",
    "benchmarks.streams",
    (
      "--model={work}/models/causal",
      "--few={work}/shipped/few_t2v_stream",
      "--output={work}/streams/few.json",
      "--prompts=96",
      *_WINDOW,
    ),
    "streams",
  ),
)


def main(argv: Sequence[str]) -> None:
  """Runs the stages that are not done yet.

  Raises:
    errors.UserError: for flags that exclude each other, outside a checkout, or
      if --workdir lacks the weights from which the stages start.
  """
  chosen = (_ABLATION, _STREAMS, _RECIPE, _DISTILLATION, _TRANSFER)
  if sum(flag.value for flag in chosen) > 1:
    names = ", ".join(f"--{flag.name}" for flag in chosen)
    raise errors.UserError(f"only one of {names} at a time")
  if _ABLATION.value:
    _require("base/model", "base")
    if reproduce.run(ablation.stages(_SEEDS.value)):
      print(ablation.write(reproduce.work(), _SEEDS.value))
  elif _RECIPE.value:
    _require("clips", "clips")
    _require("heldout_clips", "heldout_clips")
    seeds = _SEEDS.value
    if reproduce.run(autoencoder_ablation.stages(seeds, _RECIPE_STEPS.value)):
      print(autoencoder_ablation.write(reproduce.work(), seeds))
  elif _DISTILLATION.value:
    if reproduce.run(distillation.stages(_SEEDS.value)):
      print(distillation.write(reproduce.work(), _SEEDS.value))
  elif _TRANSFER.value:
    _require("base/model", "base")
    _require("shipped/transformer_t2v", "shipped/transformer_t2v")
    if reproduce.run(transfer.stages()):
      print(transfer.write(reproduce.work()))
  elif _STREAMS.value:
    _require("shipped/transformer_t2v", "shipped/transformer_t2v")
    if reproduce.run(STREAM_STAGES):
      print(f"{reproduce.work()}: everything is done")
  else:
    reproduce.main(argv)


def _require(output: str, stage: str) -> None:
  """Raises UserError unless the work directory has the stage's output."""
  work = reproduce.work()
  if not (work / output).exists():
    raise errors.UserError(
      f"{work} has no {output}: run launch.reproduce --until={stage} first"
    )
