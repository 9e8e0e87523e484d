"""Trains the family of tiny models that ships, or measures what it shows.

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

from collections.abc import Sequence

from absl import flags

from benchmarks import ablation
from dcvideogen_jax import errors
from dcvideogen_jax.programs import reproduce
from dcvideogen_jax.tiny import chain, family

_ABLATION = flags.DEFINE_bool("ablation", False, "Run the arms instead.")
_STREAMS = flags.DEFINE_bool(
  "streams", False, "Adapt for streaming and measure it instead."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the arms.")


def _streamed(name: str, *more: str) -> chain.Stage:
  return family.evaluation(
    f"streams/{name}",
    "causal",
    *("--prompts=96", *more),
    program="benchmarks.streams",
    group="streams",
  )


_WINDOW = ("--window=1", "--sink=1")
# The adapted model learns chunks of half a clip, and what streams and the model
# of whole clips show at 1, 4 and 16 times the clips' length. With a window of
# one chunk and no sink, positions are those of training.
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
  # Few and very long, for how fast they come and what they take.
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
)


def main(argv: Sequence[str]) -> None:
  """Runs the stages that are not done."""
  if _ABLATION.value and _STREAMS.value:
    raise errors.UserError("--ablation and --streams do not go together")
  if _ABLATION.value:
    _require("base/model", "base")
    if reproduce.run(ablation.stages(_SEEDS.value)):
      print(ablation.write(reproduce.work(), _SEEDS.value))
  elif _STREAMS.value:
    _require("shipped/transformer_t2v", "shipped/transformer_t2v")
    if reproduce.run(STREAM_STAGES):
      print(f"{reproduce.work()}: everything is done")
  else:
    reproduce.main(argv)


def _require(output: str, stage: str) -> None:
  """Raises UserError unless what the stages start from is there."""
  work = reproduce.work()
  if not (work / output).exists():
    raise errors.UserError(
      f"{work} has no {output}: run launch.reproduce --until={stage} first"
    )
