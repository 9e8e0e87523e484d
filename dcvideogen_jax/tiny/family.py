"""How the tiny family is made, and what AE-Adapt-V is compared with on it.

In flags "{work}" is the folder of the whole chain.
"""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dcvideogen_jax.tiny import stages

_TINY = "dcvideogen_jax/assets/dcvideogen_tiny"
_LATENTS = (
  "--config.data.path={work}/latents",
  "--config.val.data.path={work}/heldout_latents",
)
_ASKING = (
  f"--config.evaluators.semantic.text_encoder={_TINY}/text_encoder",
  f"--config.evaluators.semantic.tokenizer={_TINY}/tokenizer",
)
# Who decodes what held-out scenes are asked of.
_DEEP = (
  *_ASKING,
  "--config.evaluators.semantic.autoencoder={work}/autoencoder/model",
)
_BASE = (
  *_ASKING,
  "--config.evaluators.semantic.autoencoder={work}/wan_autoencoder/model",
)
_PARTS = (
  "--dc_ae_v={work}/autoencoder/model",
  "--base_vae={work}/wan_autoencoder/model",
  f"--text_encoder={_TINY}/text_encoder",
  f"--tokenizer={_TINY}/tokenizer",
  f"--image_encoder={_TINY}/image_encoder",
)
_ENCODING = (
  *_PARTS,
  "--i2v",
  "--negative_prompt=wan",
  "--text_tokens=32",
  "--frames=16",
  "--bucket=64x64",
  "--batch=16",
  "--part=512",
)
_T2V = "configs/adapt.py:tiny_t2v"
_I2V = "configs/adapt.py:tiny_i2v"
_REAL = (
  "--config.data.path={work}/clips",
  "--config.val.data.path={work}/heldout_clips/frames16",
)


def _evaluation(
  name: str, model: str, *more: str, group: str = ""
) -> stages.Stage:
  """Held-out scenes, asked of one of `MODELS`."""
  return stages.Stage(
    name,
    f"{name}.json",
    "evaluate",
    (
      f"--model={{work}}/models/{model}",
      f"--output={{work}}/{name}.json",
      "--steps=16",
      "--guidance=3",
      "--shift=3",
      *more,
    ),
    group,
  )


def _shipped(name: str, trained: str) -> stages.Stage:
  """The weights that come with the package."""
  name = f"shipped/{name}"
  return stages.Stage(
    name,
    name,
    "export",
    (
      f"--workdir={{work}}/{trained}",
      f"--output={{work}}/{name}",
      "--dtype=bfloat16",
    ),
  )


STAGES = (
  # Real clips, and what both autoencoders make of the world.
  stages.Stage("clips", "clips", "prepare_clips", ("--output={work}/clips",)),
  stages.Stage(
    "heldout_clips",
    "heldout_clips",
    "prepare_clips",
    ("--split=heldout", "--output={work}/heldout_clips"),
  ),
  stages.train(
    "autoencoder_real",
    "configs/tiny.py:autoencoder",
    *_REAL,
    "--config.steps=4000",
  ),
  stages.train(
    "autoencoder",
    "configs/tiny.py:autoencoder",
    *_REAL,
    "--config.weights={work}/autoencoder_real/model",
    "--config.data.parts=('records','synthetic','world')",
    "--config.data.weights=(0.25,0.05,0.7)",
    "--config.loss.l1=0.2",
    "--config.loss.mse=4.0",
    "--config.optim.lr=4e-4",
    "--config.steps=4000",
  ),
  # Short clips first, which cost less.
  stages.train("wan_short", "configs/tiny.py:wan_autoencoder"),
  stages.train(
    "wan_autoencoder",
    "configs/tiny.py:wan_autoencoder",
    "--config.weights={work}/wan_short/model",
    "--config.data.frames=13",
    "--config.optim.lr=7e-4",
    "--config.steps=400",
  ),
  stages.Stage(
    "latents",
    "latents/index.json",
    "precompute",
    ("--world=10560", *_ENCODING, "--output={work}/latents"),
  ),
  stages.Stage(
    "heldout_latents",
    "heldout_latents/index.json",
    "precompute",
    (
      "--world=400",
      "--split=heldout",
      *_ENCODING,
      "--output={work}/heldout_latents",
    ),
  ),
  # Of one clip: Wan's negative prompt for image to video is another one.
  stages.Stage(
    "negative_i2v",
    "negative_i2v/index.json",
    "precompute",
    (
      "--world=1",
      *_ENCODING,
      "--negative_prompt=wan_i2v",
      "--output={work}/negative_i2v",
    ),
  ),
  # The base, which stands for Wan: images first, as Wan itself was trained.
  # The first latent frame is one, at a quarter of a clip's tokens.
  stages.train(
    "base_images",
    f"{_T2V},phase=base",
    *_LATENTS,
    *_BASE,
    "--config.start.random=True",
    "--config.data.latent_frames=1",
    "--config.val.data.latent_frames=1",
    "--config.evaluators.semantic.frames=1",
    "--config.batch_size=32",
    "--config.steps=18000",
    "--config.val.every=2000",
    "--config.evaluators.semantic.every=2000",
  ),
  stages.train(
    "base",
    f"{_T2V},phase=base",
    *_LATENTS,
    *_BASE,
    "--config.start.weights={work}/base_images/model",
  ),
  # AE-Adapt-V.
  stages.train(
    "embed",
    f"{_T2V},phase=embed",
    *_LATENTS,
    "--config.start.base={work}/base/model",
    "--config.steps=3000",
  ),
  stages.train(
    "head",
    f"{_T2V},phase=head",
    *_LATENTS,
    *_DEEP,
    "--config.start.base={work}/base/model",
    "--config.start.patch_embed={work}/embed/model",
  ),
  stages.train(
    "lora",
    f"{_T2V},phase=lora",
    *_LATENTS,
    *_DEEP,
    "--config.start.weights={work}/head/model",
    "--config.steps=10000",
    "--config.val.every=500",
    "--config.evaluators.semantic.every=500",
  ),
  _shipped("transformer_t2v", "lora"),
  # Image to video begins as the adapted text-to-video model.
  stages.train(
    "i2v",
    f"{_I2V},phase=full",
    *_LATENTS,
    *_DEEP,
    f"--config.evaluators.semantic.image_encoder={_TINY}/image_encoder",
    "--config.start.weights={work}/lora/model",
    "--config.negative={work}/negative_i2v",
  ),
  _shipped("transformer_i2v", "i2v"),
  # What came of it.
  *(
    _evaluation(
      f"scores/{model}",
      model,
      "--what=semantic",
      f"--task={task}",
      f"--size={frames},64,64",
      "--prompts=400",
      group="scores",
    )
    for model, task, frames in (
      ("base", "t2v", 13),
      ("lora", "t2v", 16),
      ("i2v", "i2v", 16),
    )
  ),
)


def _streamed(name: str, model: str, *more: str) -> stages.Stage:
  return _evaluation(
    f"streams/{name}", model, "--prompts=96", *more, group="streams"
  )


_WINDOW = ("--what=stream", "--window=1", "--sink=1")


# Streaming: the adapted model learns chunks of half a clip, and what streams
# and the model of whole clips show at 1, 4 and 16 times the clips' length. With
# a window of one chunk and no sink, positions are those of training.
STREAM_STAGES = (
  stages.train(
    "causal",
    f"{_T2V},phase=lora,causal=teacher",
    *_LATENTS,
    *_DEEP,
    "--config.start.weights={work}/lora/model",
    "--config.steps=2000",
  ),
  _streamed("window", "causal", "--what=stream", "--window=1"),
  _streamed("sink", "causal", *_WINDOW),
  _streamed("all", "causal", "--what=stream", "--lengths=1,4"),
  # Few and very long, for how fast they come and what they take.
  _streamed("long", "causal", *_WINDOW, "--prompts=8", "--lengths=1,256"),
  *(
    _streamed(
      f"whole_{frames}",
      "lora",
      "--what=semantic",
      f"--size={frames},64,64",
      "--at_end",
    )
    for frames in (16, 64, 256)
  ),
)

# Transformers that are asked: where they are, and whose latents they make.
_WAN_VAE = ("wan_vae", "wan_autoencoder")
_DC_AE_V = ("dc_ae_v", "autoencoder")
MODELS = {
  "base": ("base/model", *_WAN_VAE),
  "lora": ("shipped/transformer_t2v", *_DC_AE_V),
  "i2v": ("shipped/transformer_i2v", *_DC_AE_V),
  "causal": ("causal/model", *_DC_AE_V),
}


def parts(work: str, model: str) -> dict[str, str | int]:
  """The parts.json of one of `MODELS`."""
  shipped = importlib.resources.files("dcvideogen_jax") / "assets"
  transformer, kind, autoencoder = MODELS[model]
  encoders = ("text_encoder", "tokenizer", "image_encoder")
  return {
    "transformer": f"{work}/{transformer}",
    kind: f"{work}/{autoencoder}/model",
    **{part: str(shipped / "dcvideogen_tiny" / part) for part in encoders},
    "scheduler": str(
      shipped / "dcvideogen_tiny" / "scheduler" / "scheduler_config.json"
    ),
    "text_tokens": 32,
  }


class Arm(NamedTuple):
  """A way from the base to the deep latents.

  Attributes:
    title: for people.
    phases: of `adapt.phases.PHASES`, in order, each with its flags; "{last}"
      stands for the folder of the phase before.
  """

  title: str
  phases: Sequence[tuple[str, Sequence[str]]]


_FROM_BASE = "--config.start.base={work}/base/model"
_LORA = ("lora", ("--config.start.weights={last}/model",))
ARMS: Mapping[str, Arm] = {
  "adapt": Arm(
    "AE-Adapt-V",
    (
      ("embed", (_FROM_BASE,)),
      ("head", (_FROM_BASE, "--config.start.patch_embed={last}/model")),
      _LORA,
    ),
  ),
  "skip_embed": Arm(
    "without the first phase", (("head", (_FROM_BASE,)), _LORA)
  ),
  "direct": Arm("fine-tuning without alignment", (("direct", (_FROM_BASE,)),)),
  "scratch": Arm(
    "from nothing", (("scratch", ("--config.start.random=True",)),)
  ),
}


def arm_stages(seeds: Sequence[str]) -> list[stages.Stage]:
  """All runs of all arms."""
  found = []
  for seed in seeds:
    for arm, (_, phases) in ARMS.items():
      last = ""
      for phase, arguments in phases:
        name = f"ablation/{arm}_{seed}/{phase}"
        found.append(
          stages.train(
            name,
            f"{_T2V},phase={phase}",
            f"--config.seed={seed}",
            *_LATENTS,
            *(_DEEP if phase != "embed" else ()),
            *(x.replace("{last}", f"{{work}}/{last}") for x in arguments),
            group=phase,
          )
        )
        last = name
  return found
