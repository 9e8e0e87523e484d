"""Trains DC-AE-V at its released sizes (arXiv 2509.25182).

  dcvideogen train --config=configs/dc_ae_v.py:f32t4c32 \\
    --workdir=out/f32t4c32 --config.data.path=<folder of videos> \\
    --config.val.data.path=<other folder of videos>

The authors have not published their recipe. The optimiser is that of Open-Sora
2.0's Video DC-AE (lr 5e-5, betas 0.9 and 0.98, clip 1, EMA 0.99). The loss is
the reconstruction loss only. The official f32t4c32 reaches PSNR 31.08 and SSIM
0.901 on ActivityNet at 256x256x80. `runlocal` keeps the stages, with one block
each and thirty-two times narrower, and trains on generated motion.

Compiled ahead of time for a v5p:4x4x4 slice (`dcvideogen plan train`, jax
0.10.2, libtpu 0.0.42), f32t4c32 takes 26.1 of 95.7 GiB per chip, and a step
takes at least 1637 ms, at an MFU of 71.0 %.
"""

import ml_collections

from configs import common
from dcvideogen_jax.models.dc_ae_v import VARIANTS


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config for an argument such as "variant=f32t4c32,runlocal"."""
  arg = common.parse_arg(
    arg,
    {"variant": tuple(VARIANTS), "time": common.TIMES, "runlocal": ()},
  )
  c = common.training()
  c.task = "autoencoder"
  c.start = "random"
  c.weights = common.optional(str)
  # Number of batches on which the export measures the scale of the latents.
  c.statistics = 256
  c.steps = 200_000
  c.batch_size = 64
  c.ema.decay = 0.99
  c.optim.lr = 5e-5
  c.optim.warmup = 1000
  c.optim.schedule = "constant"
  c.optim.betas = (0.9, 0.98)
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.model = {
    "spatial_factor": 32,
    **VARIANTS[arg.variant],
    # The export replaces the scale by the measured one.
    "latent_scale": 1.0,
    "chunk_frames": 40,
    "temporal_factor": 4,
    "time": arg.time,
    "remat": True,
  }
  c.loss = {"l1": 1.0, "mse": 0.0, "gradient": 0.0, "dssim": 0.0}
  c.data = common.clips("videos", 40, 256, "out/videos")
  held_out = common.clips("videos", 40, 256, "out/heldout_videos")
  c.val = common.validation(held_out, batches=4, batch_size=64, every=2000)
  if arg.runlocal:
    _shrink(c)
  return c


def _shrink(c: ml_collections.ConfigDict) -> None:
  """Shrinks the config: 32 times narrower, one block per stage, short clips."""
  c.steps = 1
  c.log_every = c.save_every = c.val.every = 1
  c.optim.warmup = 0
  c.mesh.data, c.mesh.fsdp = -1, 1
  c.val.batches = c.statistics = 1
  c.model.widths = tuple(n // 32 for n in c.model.widths)
  c.model.depths = (0, *(1 for _ in c.model.depths[1:]))
  c.model.chunk_frames = 8
  c.batch_size = c.val.batch_size = 8
  for data in (c.data, c.val.data):
    data.source = "synthetic"
    data.frames, data.height, data.width = 8, 64, 64
