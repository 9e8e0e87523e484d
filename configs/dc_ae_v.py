"""Trains DC-AE-V at its released sizes (arXiv 2509.25182), in phases.

  C=configs/dc_ae_v.py:f32t4c32
  D="--config.data.path=VIDEOS --config.val.data.path=HELDOUT_VIDEOS"
  dcvideogen train --config=$C,phase=low --workdir=out/low $D \\
    --export=out/low/model
  dcvideogen train --config=$C,phase=high --workdir=out/high $D \\
    --config.weights=out/low/model --export=out/high/model
  dcvideogen train --config=$C,phase=adversarial --workdir=out/last $D \\
    --config.weights=out/high/model --export=out/last/model

A decoder with a fifth of the FLOPs for the same latents, of a trained or a
released model; `--decoder=fast` of `dcvideogen sample` then takes it:

  dcvideogen train --config=$C,phase=fast --workdir=out/fast $D \\
    --config.weights=MODEL --export=MODEL_fast

The authors have not published their recipe. The phases are rows of
`train.autoencoder_phases`: those of DC-AE, with the losses, the optimiser and
the share of images of Open-Sora 2.0's Video DC-AE. The official f32t4c32
reaches PSNR 31.08 and SSIM 0.901 on ActivityNet at 256x256x80. `runlocal` keeps
the stages, with one block each and thirty-two times narrower, and trains on
generated motion.

Compiled ahead of time for a v5p:4x4x4 slice (`dcvideogen plan train`, jax
0.10.2, libtpu 0.0.42), the phase `pixels` of f32t4c32 in float32 takes 26.1 of
95.7 GiB per chip, and a step takes at least 1637 ms, at an MFU of 71.0 %.
"""

import ml_collections

from configs import common
from dcvideogen_jax.models.dc_ae_v import FAST, VARIANTS
from dcvideogen_jax.train.autoencoder_phases import PHASES


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config for an argument such as "f32t4c32,phase=high"."""
  arg = common.parse_arg(
    arg,
    {
      "variant": tuple(VARIANTS),
      "phase": common.PHASES,
      "time": common.TIMES,
      "runlocal": (),
    },
  )
  c = common.training()
  c.task = "autoencoder"
  # Number of batches on which the export measures the scale of the latents.
  c.statistics = 256
  c.steps = 200_000
  c.batch_size = 64
  c.ema.decay = 0.99
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
  common.phase(c, arg.phase)
  c.dtype, c.optim.schedule = "bfloat16", "constant"
  row = PHASES[arg.phase]
  if row.smaller:
    c.decoder = {key: FAST[arg.variant][key] for key in ("widths", "depths")}
  c.data = common.clips("videos", row.frames, row.size, "out/videos")
  c.data.images = row.images
  c.data.image_frames = row.frames // c.model.temporal_factor
  held_out = common.clips("videos", 40, row.size, "out/heldout_videos")
  c.val = common.validation(held_out, batches=4, batch_size=64, every=2000)
  if arg.runlocal:
    _shrink(c)
  return c


def _shrink(c: ml_collections.ConfigDict) -> None:
  """Shrinks the config: 32 times narrower, one block per stage, short clips."""
  c.steps, c.dtype = 1, "float32"
  c.log_every = c.save_every = c.val.every = 1
  c.optim.warmup = 0
  c.mesh.data, c.mesh.fsdp = -1, 1
  c.val.batches = c.statistics = 1
  for model in (c.model, c.decoder) if c.decoder else (c.model,):
    model.widths = tuple(n // 32 for n in model.widths)
    model.depths = (0, *(1 for _ in model.depths[1:]))
  c.model.chunk_frames = 8
  c.batch_size = c.val.batch_size = 8
  for data in (c.data, c.val.data):
    data.source = "synthetic"
    data.frames, data.height, data.width = 8, 64, 64
  c.data.image_frames = 2
  common.without_files(c)
  if c.discriminator:
    c.discriminator.update(width=4, layers=3)
