"""AE-Adapt-V: moves a Wan model to the latents of DC-AE-V (arXiv 2509.25182).

First the clips are encoded. Three phases follow, each of which starts from the
result of the previous one:

  dcvideogen precompute ... --output=out/clips
  A=configs/adapt.py:wan_t2v_1_3b
  dcvideogen train --config=$A,phase=embed --workdir=out/embed \\
    --config.start.base=Wan2.1-T2V-1.3B --config.data.path=out/clips \\
    --export=out/embed/result
  dcvideogen train --config=$A,phase=head --workdir=out/head \\
    --config.start.base=Wan2.1-T2V-1.3B --config.data.path=out/clips \\
    --config.start.patch_embed=out/embed/result --export=out/head/result
  dcvideogen train --config=$A,phase=lora --workdir=out/lora \\
    --config.start.weights=out/head/result --config.data.path=out/clips \\
    --export=out/lora/result

Other phases serve comparisons. `direct` fine-tunes without alignment: LoRA and
a random head are trained together. `head` without `start.patch_embed` skips the
first phase. `scratch` starts from random weights, `full` trains every
parameter, and `base` trains in the base model's own latents.

`guidance` and `few` distil the result: to one evaluation per step, then to a
few steps; docs/few_steps.md describes them.

The numbers are those of DC-Gen `projects/DC-VideoGen/AE-Adapt-V.md` (commit
562077c), except that noise levels are continuous; `official_sigma_grid` draws
them from the official grid. The first phase takes one GPU, the second and third
take 16. `raw` encodes videos and captions within the training step. `runlocal`
trains a small random transformer on random numbers.

`causal=teacher` trains a block-causal model, which can make videos of any
length (`dcvideogen stream`). Each chunk has its own noise level, and attends to
clean copies of the earlier chunks. With `causal=diffusion` it attends to the
earlier chunks at their own, independently drawn noise levels, which takes half
the tokens.

`target` sets the batch size, the mesh and the remat policy for a TPU slice, for
clips of 80 frames of 480x832. All targets fit; docs/planning.md has the memory
and the time of a step.
"""

import ml_collections

from configs import common
from dcvideogen_jax.adapt import phases
from dcvideogen_jax.models.wan_dit import VARIANTS

_TINY = {"layers": 6, "width": 192, "heads": 6, "ffn_width": 768}
_TINY |= {"text_width": 64}
_TINY_WAN = _TINY | {"in_channels": 16, "out_channels": 16, "patch": (1, 2, 2)}
_TINY_DEEP = _TINY | {"in_channels": 64, "out_channels": 64, "patch": (1, 1, 1)}
_IMAGE = {"image_width": 64}


def _released(name: str, shift: float) -> tuple[dict, dict, float]:
  """Returns a row of `BASES` for a released model."""
  return VARIANTS[f"wan2.1-{name}"], VARIANTS[f"dc-wan2.1-{name}"], shift


# Per base model: its transformer's fields, those of the adapted transformer,
# and the shift of the official noise levels. The input channels of
# image-to-video models are those of the noise, 4 of the mask and those of the
# condition.
BASES = {
  "wan_t2v_1_3b": _released("t2v-1.3b", 8.0),
  "wan_t2v_14b": _released("t2v-14b", 8.0),
  "wan_i2v_14b": _released("i2v-14b", 5.0),
  "tiny_t2v": (_TINY_WAN, _TINY_DEEP, 8.0),
  "tiny_i2v": (
    _TINY_WAN | _IMAGE | {"in_channels": 36},
    _TINY_DEEP | _IMAGE | {"in_channels": 132},
    5.0,
  ),
}
# Bucket of raw clips; height, width and frames of encoded clips; and the side
# of CLIP's image in pixels.
_CLIPS = ("480", 480, 832, 80, 224)
_TINY_CLIPS = (None, 64, 64, 16, 56)
# Per target: the global batch size, the mesh and the remat policy. The official
# batch size is 32, in the first phase 4.
_TARGETS = {
  "any": (32, {"fsdp": -1}, "full"),
  "v5e_4x4": (32, {"fsdp": 16}, "full"),
  "v6e_2x4": (32, {"fsdp": 8}, "full"),
  "v5p_4x4x4": (64, {"fsdp": 64}, "dots"),
  "v6e_8x8": (64, {"fsdp": 64}, "full"),
}
# Latent frames of a chunk, equal to the autoencoder's chunk.
_CHUNK, _TINY_CHUNK = 10, 2
# Steps of the first two phases, and of all others; 14B needs fewer.
_STEPS = {"embed": 20_000, "head": 6000}
_LONG, _LONG_14B = 40_000, 8000
# Learning rate, batch size and steps of each phase of the tiny models. The
# rates are the best of those tried, in factors of two to three, except those of
# "full" and "base". With its small batch "base" learns about twice as much from
# the same number of clips.
_TINY_RUNS = {
  "embed": (1e-2, 32, 300),
  "head": (2e-2, 32, 400),
  "lora": (3e-3, 32, 1000),
  "direct": (8e-3, 32, 1700),
  "full": (5e-4, 32, 2000),
  "scratch": (3e-3, 32, 1700),
  "base": (1.5e-3, 8, 14_000),
  "guidance": (2e-3, 32, 2000),
  "few": (1e-3, 32, 300),
  "guidance_full": (5e-4, 32, 2000),
  "few_full": (2e-4, 32, 300),
}
PHASES = tuple(phases.PHASES)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config for an argument such as "wan_t2v_1_3b,phase=lora"."""
  arg = common.parse_arg(
    arg,
    {
      "base": tuple(BASES),
      "phase": PHASES,
      "causal": ("off", "diffusion", "teacher"),
      "target": tuple(_TARGETS),
      "official_sigma_grid": (),
      "raw": (),
      "runlocal": (),
    },
  )
  base, deep, shift = BASES[arg.base]
  tiny = arg.base.startswith("tiny")
  c = common.training()
  c.phase = arg.phase
  c.model = base if arg.phase == "base" else deep
  c.model.remat = common.optional(str)
  # None chooses the fastest attention for the device; see `ops.attention`.
  c.model.attention = common.optional(str)
  # (1, 2, 2) stretches the positions of the coarser token grid to those of the
  # base model's grid.
  c.model.rope_scale = (1, 1, 1)
  # Latent frames of a block-causal chunk; None attends over the whole clip, as
  # published.
  chunk = _TINY_CHUNK if tiny else _CHUNK
  c.model.chunk = common.optional(int, None if arg.causal == "off" else chunk)
  c.dtype = c.frozen_dtype = "float32" if tiny else "bfloat16"
  # The frozen kernels of the blocks: "int8" or "float8"; None is frozen_dtype.
  c.weights = common.optional(str, None)
  c.sharding = common.DIT_SHARDING
  c.ema.decay = 0.0
  c.optim.update(warmup=0, schedule="constant", clip=0.1, betas=(0.9, 0.999))
  long = _LONG_14B if arg.base.endswith("14b") else _LONG
  c.steps = _STEPS.get(arg.phase, long)
  c.start = _start(arg.phase)
  if arg.phase == "embed":
    _embed(c, base)
  else:
    _denoise(c, arg.phase)
    _force(c, arg.causal)
    draw = "official" if arg.official_sigma_grid else "uniform"
    c.levels = {"draw": draw, "shift": shift, "weighted": True}
  if not tiny:
    _split(c, arg.target)
  c.save_every = max(1, c.steps // 20)
  _clips(c, arg)
  if tiny:
    _train_tiny(c, arg)
  if arg.runlocal:
    _shrink(c)
  return c


def _start(phase: str) -> ml_collections.ConfigDict:
  """Weights that a run starts from; see `train.weights.check_start`."""
  c = ml_collections.ConfigDict()
  for key in ("base", "weights", "patch_embed"):
    c[key] = common.optional(str)
  c.head = "random" if phase == "direct" else "zero"
  c.random = False
  return c


def _embed(c: ml_collections.ConfigDict, base: dict) -> None:
  """Phase 1: the new patch embedding learns to give the base model's tokens."""
  c.task = "align"
  c.base = base
  c.align = {"loss": "pool", "upsample": "nearest"}
  c.batch_size = 4
  c.frozen_dtype = "float32"
  c.optim.update(lr=2e-4, betas=(0.9, 0.9), clip=0.0)


def _denoise(c: ml_collections.ConfigDict, phase: str) -> None:
  """Phases 2 and 3 and the phases for comparison, which do flow matching."""
  c.task = phases.PHASES[phase].task
  c.space = "base" if phase == "base" else "deep"
  c.text_dropout = 0.1
  c.lora = {"rank": 256, "alpha": 512.0}
  c.batch_size = 32
  c.optim.lr = 1e-4
  if phase in ("lora", "direct", "full"):
    c.optim.update(lr=5e-5, warmup=1000)
    c.ema = {"decay": 0.9999, "ramp": "exponential", "steps": 2000}
  if c.task == "distil":
    _distil(c, phase)


def _distil(c: ml_collections.ConfigDict, phase: str) -> None:
  """Distillation; see `dcvideogen_jax.train.distil.distil`."""
  guidance = phase.startswith("guidance")
  c.distil = {
    "kind": "guidance" if guidance else "matching",
    "guidance": 5.0,
    "levels": (1.0, 0.9375, 0.8333333333333334, 0.625),
    "lora": common.optional(str),
    # Weights of whole clips that teach a block-causal student; None is the
    # model that it starts from.
    "teacher": common.optional(str),
  }
  c.lora = {"rank": 64, "alpha": 64.0}
  c.optim.update(lr=2e-5, warmup=100)
  if not guidance:
    c.optim.update(lr=2e-6, betas=(0.0, 0.999))
  c.ema = {"decay": 0.99, "ramp": "ratio", "steps": 2000}


def _force(c: ml_collections.ConfigDict, causal: str) -> None:
  """Noise levels of chunks; see `dcvideogen_jax.adapt.forcing.read`."""
  c.forcing = {
    "per_chunk": causal != "off",
    "clean": common.optional(float, 0.0 if causal == "teacher" else None),
  }


def _split(c: ml_collections.ConfigDict, target: str) -> None:
  """Sets batch size, mesh and remat policy for a target."""
  batch, mesh, c.model.remat = _TARGETS[target]
  c.mesh = common.mesh(**mesh)
  if c.task != "align" or target != "any":
    c.batch_size = batch


def _clips(
  c: ml_collections.ConfigDict, arg: ml_collections.ConfigDict
) -> None:
  """Data for training and validation: encoded clips or, for `raw`, videos."""
  spaces = ("base", "deep") if c.task == "align" else (c.space,)
  texts = () if c.task == "align" else ("text",)
  images = ("image",) if "image_width" in c.model else ()
  size = _TINY_CLIPS if arg.base.startswith("tiny") else _CLIPS
  _, height, width, frames, seen = size
  if arg.raw:
    c.encoders = {
      name: {"path": common.optional(str), "dtype": "float32"}
      for name in (*spaces, *texts, *images)
    }
    if texts:
      c.encoders.text.dtype = c.dtype
    c.data, held_out = (_videos(size, bool(images)) for _ in range(2))
  else:
    c.encoders = None
    conditions = tuple(f"{space}_condition" for space in spaces if images)
    # The first phase does not use CLIP's features.
    keys = (*spaces, *conditions, *texts, *(images if texts else ()))
    c.data, held_out = _latents(keys), _latents(keys)
    # The clips before encoding. Training reads the shapes of latents from its
    # files; `dcvideogen plan` reads no files and derives the shapes from this.
    c.clips = {
      "frames": frames,
      "height": height,
      "width": width,
      "factor": 32,
      "image_size": seen,
    }
  if texts:
    # A folder of encoded clips also holds the negative prompt's embedding.
    c.negative = common.optional(str)
    if not arg.raw:
      c.negative = c.data.get_ref("path")
  c.val = common.validation(held_out, 4, c.batch_size, every=c.save_every)


def _train_tiny(
  c: ml_collections.ConfigDict, arg: ml_collections.ConfigDict
) -> None:
  """Sets numbers for the tiny models, which learn in thousands of steps.

  The official learning rates are meant for tens of thousands of steps. A LoRA
  rank above the model's width would make no sense.
  """
  rate, c.batch_size, c.steps = _TINY_RUNS[arg.phase]
  c.val.batch_size = 32
  c.log_every, c.save_every = 50, 100
  c.val.every = max(250, c.steps // 12)
  c.optim.update(lr=rate, warmup=min(100, c.steps // 10), schedule="cosine")
  c.keep = 2
  if arg.phase == "embed":
    return
  c.optim.clip = 1.0
  c.ema = {"decay": 0.999, "ramp": "ratio", "steps": 2000}
  c.levels.weighted = False
  if c.task == "denoise":
    c.lora = {"rank": 64, "alpha": 128.0}
  else:
    c.lora = {"rank": 32, "alpha": 64.0}
    c.distil.update(guidance=3.0, levels=(1.0, 0.9, 0.75, 0.5))
  if arg.phase.startswith("few"):
    # The critic has to keep up with the student.
    c.optim.lr_scale = (("(lora|params)/.*", 0.3), (".*", 1.0))
  if arg.phase == "base":
    c.levels.update(draw="shifted", shift=2.0)
  for data in (c.data, c.val.data):
    data.text_tokens = 32
  if not arg.raw:
    questions = _questions(arg.phase == "base", c.val.every)
    if c.task == "distil":
      questions.guidance = 1.0
      questions.levels = common.optional(tuple)
      if arg.phase.startswith("few"):
        questions.update(
          steps=len(c.distil.levels), solver="renoise", levels=c.distil.levels
        )
    c.evaluators = {"semantic": questions}


def _questions(base: bool, every: int) -> ml_collections.ConfigDict:
  """Evaluation on held-out scenes; see `tiny.evaluators.build`."""
  c = ml_collections.ConfigDict({"what": "semantic"})
  c.prompts, c.every, c.batch_size, c.seed = 96, every, 32, 0
  c.frames, c.height, c.width = 13 if base else 16, 64, 64
  c.solver, c.steps, c.shift, c.guidance = "unipc", 16, 3.0, 3.0
  c.text_tokens = 32
  for key in ("autoencoder", "text_encoder", "tokenizer", "image_encoder"):
    c[key] = common.optional(str)
  return c


def _latents(keys: tuple[str, ...]) -> ml_collections.ConfigDict:
  """Encoded clips; see `dcvideogen_jax.data.latents.sources`."""
  return ml_collections.ConfigDict(
    {
      "source": "latents",
      "path": common.optional(str),
      "keys": keys,
      "text_tokens": 512,
      "latent_frames": common.optional(int),
    }
  )


def _videos(size: tuple, images: bool) -> ml_collections.ConfigDict:
  """Videos and captions; see `dcvideogen_jax.data.captioned.sources`."""
  bucket, height, width, frames, image = size
  c = ml_collections.ConfigDict({"source": "captioned_videos"})
  for key in ("path", "captions", "tokenizer"):
    c[key] = common.optional(str)
  c.bucket = common.optional(str, bucket)
  for key, size in (("height", height), ("width", width)):
    c[key] = common.optional(int, None if bucket else size)
  c.frames, c.text_tokens = frames, 512
  # Frames per second, chosen by the times of frames; None takes all frames.
  c.fps = common.optional(float, 16.0)
  # Spatial compression of the autoencoder: 64 for f64 variants.
  c.factor = 32
  c.image_size = common.optional(int, image if images else None)
  c.stretch = False
  return c


def _shrink(c: ml_collections.ConfigDict) -> None:
  """Shrinks the config: a tiny random model, random data, no files, seconds."""
  c.steps = 2
  c.log_every = c.save_every = c.val.every = c.val.batches = 1
  c.optim.warmup = 0
  c.batch_size = c.val.batch_size = 8
  c.mesh = common.mesh(data=-1)
  c.dtype = c.frozen_dtype = "float32"
  c.start.random = True
  for model in (c.model, c.get("base", {})):
    model.update(
      {"layers": 2, "width": 32, "heads": 2, "ffn_width": 48, "text_width": 12}
    )
  if "lora" in c:
    c.lora = {"rank": 4, "alpha": 8.0}
  wide = c.model.get("image_width")
  shapes = {"text": (5, 12), **({"image": (3, wide)} if wide else {})}
  for space, size, channels in (
    ("deep", 2, c.model.out_channels),
    ("base", 4, 16),
  ):
    shapes[space] = shapes[f"{space}_condition"] = (3, size, size, channels)
  c.encoders = c.negative = None
  c.evaluators = {}
  c.data = c.val.data = {"source": "noise", "shapes": shapes}
