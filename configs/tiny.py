"""Trains the tiny autoencoders, on a laptop; trained ones ship in the package.

The task `autoencoder` is a DC-AE-V, f32t4 with 64 latent channels, trained on
64x64 crops of 16 frames from real clips and generated motion. The three
temporal designs of arXiv 2509.25182 differ only in the `time` argument.

  dcvideogen prepare-clips --output=out/clips
  dcvideogen prepare-clips --split=heldout --output=out/heldout
  dcvideogen train --config=configs/tiny.py:autoencoder \\
    --workdir=out/autoencoder --export=out/autoencoder/model
  dcvideogen train --config=configs/tiny.py:autoencoder,time=causal \\
    --workdir=out/causal

The task `wan_autoencoder` is an autoencoder like Wan's, for the tiny base
model. The table of results in the documentation has the numbers to expect.
`runlocal` is the same run on generated motion, small enough for a test.
"""

import ml_collections

from configs import common
from dcvideogen_jax.train.autoencoder_phases import PHASES


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config for an argument such as "autoencoder,time=causal"."""
  arg = common.parse_arg(
    arg,
    {
      "task": tuple(_TASKS),
      "phase": ("pixels", *common.PHASES),
      "time": common.TIMES,
      "runlocal": (),
    },
  )
  c = common.training()
  c.task = arg.task
  _TASKS[arg.task](c, arg)
  return c


def _autoencoder(c, arg) -> None:
  c.steps = 1000
  c.batch_size = 4
  c.log_every, c.save_every = 20, 100
  c.ema.decay = 0.995
  # Number of batches on which the export measures the scale of the latents.
  c.statistics = 32
  c.model = {
    "latent_channels": 64,
    "widths": (16, 16, 32, 32, 32, 64, 64),
    "depths": (0, 1, 1, 1, 1, 1, 1),
    "chunk_frames": 8,
    "spatial_factor": 32,
    "temporal_factor": 4,
    "time": arg.time,
  }
  _phase(c, arg.phase)
  if PHASES[arg.phase].smaller:
    c.decoder = {
      "widths": (16, 8, 16, 32, 32, 64, 64),
      "depths": c.model.depths,
    }
  c.data = common.clips("mix", 16, 64, "out/clips")
  c.data.images, c.data.image_frames = PHASES[arg.phase].images, 4
  held_out = common.clips("records", 16, 64, "out/heldout/frames16")
  c.val = common.validation(held_out, batches=6, batch_size=4, every=200)
  if arg.runlocal:
    _shrink(c)
    c.model.widths, c.model.depths = (8, 8, 8, 8), (0, 1, 1, 1)
    c.model.spatial_factor = 4
    if c.decoder:
      c.decoder = {"widths": (8, 4, 8, 8), "depths": c.model.depths}
    common.without_files(c)
    c.lpips.measure = None  # AlexNet needs larger frames.
    if c.discriminator:
      c.discriminator.update(width=4, layers=2)


def _phase(c: ml_collections.ConfigDict, name: str) -> None:
  """Sets a phase's fields, with learning rates for a short training."""
  common.phase(c, name)
  c.lpips.frames = 1
  c.optim.update(lr=2e-4, warmup=50, betas=(0.9, 0.99), decay=0.0)
  if name == "pixels":
    c.loss.mse = 1.0
  if c.discriminator:
    c.discriminator.update(width=32, layers=3)
  if c.start == "random":
    c.start = "shortcuts"


def _wan_autoencoder(c, arg) -> None:
  c.steps = 1000
  c.batch_size = 4
  c.log_every, c.save_every = 20, 100
  c.ema.decay = 0.995
  c.optim.lr, c.optim.warmup = 1e-3, 50
  c.start = "colours"
  c.weights = common.optional(str)
  # Number of batches on which the export measures the scale of the latents.
  c.statistics = 32
  c.model = {"base_width": 12, "multipliers": (1, 2, 2, 4), "blocks": 1}
  # Squared errors dominate, as absolute errors are minimised by the median of a
  # neighbourhood, which misses the small shapes.
  c.loss = {"l1": 0.1, "mse": 4.0, "gradient": 0.0, "dssim": 0.0, "kl": 1e-4}
  c.data = common.clips("world", 5, 64)
  held_out = common.clips("world", 13, 64)
  held_out.split = "heldout"
  c.val = common.validation(held_out, batches=6, batch_size=4, every=200)
  if arg.runlocal:
    _shrink(c)
    c.start = "random"
    c.model = {"base_width": 4, "multipliers": (1, 1, 1, 1), "blocks": 1}


def _shrink(c: ml_collections.ConfigDict) -> None:
  """Shrinks the config: it needs no files and takes seconds."""
  c.steps = 2
  c.log_every = c.save_every = c.val.every = 1
  c.optim.warmup = 1
  c.val.batches = c.statistics = 1
  for data in (c.data, c.val.data):
    data.source, data.height, data.width = "synthetic", 16, 16


_TASKS = {"autoencoder": _autoencoder, "wan_autoencoder": _wan_autoencoder}
