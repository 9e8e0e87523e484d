"""Parts shared by the configs of trainings: optimiser, data, validation."""

from typing import Any

import ml_collections
from ml_collections import config_dict

from dcvideogen_jax import config_parts
from dcvideogen_jax.config_parts import DIT_SHARDING as DIT_SHARDING
from dcvideogen_jax.train import autoencoder_phases

mesh, parse_arg = config_parts.mesh, config_parts.parse_arg


def optional(kind: type, value: Any = None) -> config_dict.FieldReference:
  """Returns a config field that may be None or a value of type `kind`."""
  reference = config_dict.placeholder(kind)
  reference.set(value)
  return reference


PHASES = tuple(autoencoder_phases.PHASES)
TIMES = ("chunk_causal", "causal", "non_causal")


def training() -> ml_collections.ConfigDict:
  """Returns the fields of a training config that rarely differ."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.keep = 3
  c.log_every = 50
  c.save_every = 500
  c.history = False
  c.accumulate = 1
  c.ema = {"decay": 0.999, "ramp": "ratio", "steps": 2000}
  c.optim = adamw()
  c.mesh = mesh(data=-1)
  c.sharding = ((".*", "fsdp"),)
  return c


def adamw() -> ml_collections.ConfigDict:
  """Returns AdamW with warm-up, cosine schedule and clipping.

  Weight decay applies to kernels only.
  """
  return ml_collections.ConfigDict(
    {
      "name": "adamw",
      "lr": 1e-3,
      "warmup": 100,
      "schedule": "cosine",
      "final": 0.01,
      "betas": (0.9, 0.99),
      "eps": 1e-8,
      "clip": 1.0,
      "decay": 0.0,
      "decay_mask": ((".*/kernel", True), (".*", False)),
      # Factor of the learning rate, by parameter name; the first match counts.
      "lr_scale": ((".*", 1.0),),
    }
  )


def clips(
  source: str, frames: int, size: int, path: str | None = None
) -> ml_collections.ConfigDict:
  """Returns a data config of square clips; see `data.random_clips.elements`.

  Args:
    source: a source of `data.random_clips`.
    frames: number of frames of a clip.
    size: height and width in pixels.
    path: file or folder of the source, if it has one.
  """
  c = ml_collections.ConfigDict()
  c.source = source
  c.path = optional(str, path)
  c.frames, c.height, c.width = frames, size, size
  c.parts, c.weights = ("records", "synthetic"), (0.8, 0.2)
  c.split = "train"
  c.flip = True
  c.reverse = False
  c.max_stride = 1
  c.max_zoom = 2.0
  # Share of the batches that are images, and the images from each clip.
  c.images, c.image_frames = 0.0, 1
  return c


def phase(c: ml_collections.ConfigDict, name: str) -> None:
  """Sets the fields of a phase of DC-AE-V's training, but those of the data.

  Args:
    c: the config, with `training` and "model".
    name: of the phase, a key of `autoencoder_phases.PHASES`.
  """
  row = autoencoder_phases.PHASES[name]
  c.phase = name
  c.start, c.weights = row.start, optional(str)
  c.dtype = "float32"
  terms = ("l1", "mse", "gradient", "dssim", "wavelet", "lpips")
  terms += ("latent", "gan", "teacher", "features")
  c.loss = dict.fromkeys(terms, 0.0) | dict(row.loss)
  # Networks of the loss and of the validation, and the frames of each clip that
  # the loss sees in a step.
  net, measure = ("vgg", "alex") if c.loss.lpips else (None, None)
  c.lpips = {"net": optional(str, net), "measure": optional(str, measure)}
  c.lpips.frames, c.lpips.start = 4, "package"
  # Numbers of latent channels, one of which a clip's decoder sees; () for all.
  c.prefixes = ()
  c.optim.update(row.optim)
  # Widths and depths of a smaller decoder, for the phase that trains one.
  c.decoder = None
  c.discriminator = None
  if row.discriminator:
    c.discriminator = ml_collections.ConfigDict(row.discriminator)
    c.discriminator.optim = adamw()
    c.discriminator.optim.update(row.discriminator["optim"])
    c.discriminator.optim.schedule = "constant"


def without_files(c: ml_collections.ConfigDict) -> None:
  """Lets a phase start from random weights, and by random networks."""
  c.lpips.start = "random"
  if c.start == "weights":
    c.start = "random"


def validation(
  data: ml_collections.ConfigDict, batches: int, batch_size: int, every: int
) -> ml_collections.ConfigDict:
  """Returns a validation config, for a fixed set of held-out batches.

  Args:
    data: data config of the held-out clips.
    batches: number of batches.
    batch_size: number of clips in a batch.
    every: number of training steps between two validations; 0 for none.
  """
  c = ml_collections.ConfigDict()
  c.data = data
  c.batches, c.batch_size, c.every = batches, batch_size, every
  return c
