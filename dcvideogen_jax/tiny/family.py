"""The stages of the chain that trains the tiny family.

In flags, "{work}" stands for the folder of the whole chain. The stages override
values of `configs/tiny.py` and `configs/adapt.py`.
"""

import importlib.resources
from collections.abc import Sequence

from dcvideogen_jax.tiny import chain

_TINY = (
  importlib.resources.files("dcvideogen_jax") / "assets" / "dcvideogen_tiny"
)
T2V = "configs/adapt.py:tiny_t2v"
_I2V = "configs/adapt.py:tiny_i2v"
# Flags for the data of a transformer's training.
LATENTS = (
  "--config.data.path={work}/latents",
  "--config.val.data.path={work}/heldout_latents",
)
_ENCODERS = (
  f"--config.evaluators.semantic.text_encoder={_TINY}/text_encoder",
  f"--config.evaluators.semantic.tokenizer={_TINY}/tokenizer",
)
# Flags for scoring held-out scenes during a training: with DC-AE-V's latents
# (DEEP) and with the tiny Wan VAE's (BASE).
DEEP = (
  *_ENCODERS,
  "--config.evaluators.semantic.autoencoder={work}/autoencoder/model",
)
BASE = (
  *_ENCODERS,
  "--config.evaluators.semantic.autoencoder={work}/wan_autoencoder/model",
)
_PRECOMPUTE = (
  "--dc_ae_v={work}/autoencoder/model",
  "--base_vae={work}/wan_autoencoder/model",
  f"--text_encoder={_TINY}/text_encoder",
  f"--tokenizer={_TINY}/tokenizer",
  f"--image_encoder={_TINY}/image_encoder",
  "--i2v",
  "--text_tokens=32",
  "--frames=16",
  "--bucket=64x64",
  "--batch=16",
  "--part=512",
)
_REAL = (
  "--config.data.path={work}/clips",
  "--config.val.data.path={work}/heldout_clips/frames16",
)


def _encoded(
  name: str, clips: int, *more: str, negative: str = "wan"
) -> chain.Stage:
  """Makes a stage that encodes clips of the world with both autoencoders."""
  return chain.Stage(
    name,
    f"{name}/index.json",
    "launch.precompute",
    (
      f"--world={clips}",
      *_PRECOMPUTE,
      f"--negative_prompt={negative}",
      f"--output={{work}}/{name}",
      *more,
    ),
  )


def evaluation(
  name: str, model: str, *more: str, program: str, group: str
) -> chain.Stage:
  """Makes a stage that scores one of `MODELS` on held-out scenes.

  Args:
    name: name of the stage; it writes NAME.json.
    model: a key of `MODELS`.
    *more: further flags of the program.
    program: the module to run.
    group: as in `chain.Stage`.
  """
  return chain.Stage(
    name,
    f"{name}.json",
    program,
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


def semantic(
  name: str, model: str, frames: int, *more: str, group: str
) -> chain.Stage:
  """Makes a stage that scores held-out scenes with `launch.evaluate`.

  Args:
    name: name of the stage; it writes NAME.json.
    model: a key of `MODELS`.
    frames: number of frames of a clip.
    *more: further flags of the program.
    group: as in `chain.Stage`.
  """
  return evaluation(
    name,
    model,
    "--what=semantic",
    f"--size={frames},64,64",
    *more,
    program="launch.evaluate",
    group=group,
  )


def _exported(name: str, trained: str, *more: str) -> chain.Stage:
  """Makes a stage that exports weights for the package, in bfloat16."""
  name = f"shipped/{name}"
  return chain.Stage(
    name,
    name,
    "launch.export",
    (
      f"--workdir={{work}}/{trained}",
      f"--output={{work}}/{name}",
      "--dtype=bfloat16",
      *more,
    ),
  )


def few(
  name: str,
  model: str,
  *more: str,
  causal: str = "off",
  few_steps: Sequence[str] = (),
) -> tuple[chain.Stage, ...]:
  """Makes the stages that distil an adapted model: guidance, then few steps.

  Args:
    name: what follows "guidance_" and "few_" in the names of the stages.
    model: the transformer that is distilled, below the work directory.
    *more: further flags of both trainings.
    causal: as in `configs/adapt.py`.
    few_steps: further flags of the second training.
  """
  start = f"--config.start.weights={{work}}/{model}"
  guidance, causal = f"guidance_{name}", f"causal={causal}"
  return (
    chain.train(
      guidance, f"{T2V},phase=guidance,{causal}", *DEEP, start, *more
    ),
    chain.Stage(
      f"{guidance}/lora",
      f"{guidance}/lora",
      "launch.export",
      (
        f"--workdir={{work}}/{guidance}",
        f"--output={{work}}/{guidance}/lora",
        "--format=lora",
      ),
    ),
    chain.train(
      f"few_{name}",
      f"{T2V},phase=few,{causal}",
      *DEEP,
      start,
      f"--config.distil.lora={{work}}/{guidance}/lora",
      *few_steps,
      *more,
    ),
    _exported(f"few_{name}", f"few_{name}", "--format=lora"),
  )


STAGES = (
  # Real clips, both autoencoders, and the world's latents.
  chain.Stage(
    "clips", "clips", "launch.prepare_clips", ("--output={work}/clips",)
  ),
  chain.Stage(
    "heldout_clips",
    "heldout_clips",
    "launch.prepare_clips",
    ("--split=heldout", "--output={work}/heldout_clips"),
  ),
  chain.train(
    "autoencoder_real",
    "configs/tiny.py:autoencoder",
    *_REAL,
    "--config.steps=4000",
  ),
  chain.train(
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
  # Short clips come first, since they cost less.
  chain.train("wan_short", "configs/tiny.py:wan_autoencoder"),
  chain.train(
    "wan_autoencoder",
    "configs/tiny.py:wan_autoencoder",
    "--config.weights={work}/wan_short/model",
    "--config.data.frames=13",
    "--config.optim.lr=7e-4",
    "--config.steps=400",
  ),
  _encoded("latents", 10560),
  _encoded("heldout_latents", 400, "--split=heldout"),
  # One clip, only for its negative prompt: Wan's differs for image to video.
  _encoded("negative_i2v", 1, negative="wan_i2v"),
  # The base, which plays the part of Wan. Like Wan, it is first trained on
  # images: a clip's first latent frame encodes one image, with a quarter of the
  # clip's tokens.
  chain.train(
    "base_images",
    f"{T2V},phase=base",
    *LATENTS,
    *BASE,
    "--config.start.random=True",
    "--config.data.latent_frames=1",
    "--config.val.data.latent_frames=1",
    "--config.evaluators.semantic.frames=1",
    "--config.batch_size=32",
    "--config.steps=18000",
    "--config.val.every=2000",
    "--config.evaluators.semantic.every=2000",
  ),
  chain.train(
    "base",
    f"{T2V},phase=base",
    *LATENTS,
    *BASE,
    "--config.start.weights={work}/base_images/model",
  ),
  # AE-Adapt-V.
  chain.train(
    "embed",
    f"{T2V},phase=embed",
    *LATENTS,
    "--config.start.base={work}/base/model",
    "--config.steps=3000",
  ),
  chain.train(
    "head",
    f"{T2V},phase=head",
    *LATENTS,
    *DEEP,
    "--config.start.base={work}/base/model",
    "--config.start.patch_embed={work}/embed/model",
  ),
  chain.train(
    "lora",
    f"{T2V},phase=lora",
    *LATENTS,
    *DEEP,
    "--config.start.weights={work}/head/model",
    "--config.steps=10000",
    "--config.val.every=500",
    "--config.evaluators.semantic.every=500",
  ),
  _exported("transformer_t2v", "lora"),
  # Image to video starts from the adapted text-to-video model.
  chain.train(
    "i2v",
    f"{_I2V},phase=full",
    *LATENTS,
    *DEEP,
    f"--config.evaluators.semantic.image_encoder={_TINY}/image_encoder",
    "--config.start.weights={work}/lora/model",
    "--config.negative={work}/negative_i2v",
  ),
  _exported("transformer_i2v", "i2v"),
  # The few-step LoRA of the text-to-video model.
  *few("t2v", "shipped/transformer_t2v", *LATENTS),
  # The scores of the trained models.
  *(
    semantic(
      f"scores/{model}",
      model,
      frames,
      f"--task={task}",
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

# Models to score: folder of the transformer, kind and stage of its autoencoder.
_WAN_VAE = ("wan_vae", "wan_autoencoder")
_DC_AE_V = ("dc_ae_v", "autoencoder")
MODELS = {
  "base": ("base/model", *_WAN_VAE),
  "lora": ("shipped/transformer_t2v", *_DC_AE_V),
  "i2v": ("shipped/transformer_i2v", *_DC_AE_V),
  "causal": ("causal/model", *_DC_AE_V),
}


def parts(work: str, model: str) -> dict[str, str | int]:
  """Returns the content of parts.json for one of `MODELS`.

  Args:
    work: folder of the chain.
    model: a key of `MODELS`.
  """
  transformer, kind, autoencoder = MODELS[model]
  encoders = ("text_encoder", "tokenizer", "image_encoder")
  return {
    "transformer": f"{work}/{transformer}",
    kind: f"{work}/{autoencoder}/model",
    **{part: str(_TINY / part) for part in encoders},
    "scheduler": str(_TINY / "scheduler" / "scheduler_config.json"),
    "text_tokens": 32,
  }
