"""Decodes chunks with DC-AE-V, and compares its memory with the plan."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import cases
from benchmarks.gpu.cases import Row
from dcvideogen_jax import memory, sharding
from dcvideogen_jax.models import bands, dc_ae_v, streaming
from dcvideogen_jax.plan import autoencoder

LARGE = dc_ae_v.VARIANTS["f32t4c32"]
SMALL = {
  "latent_channels": 4,
  "widths": (8, 8, 8, 16, 16),
  "depths": (0, 1, 2, 1, 1),
  "chunk_frames": 8,
  "spatial_factor": 8,
}
# Chunks that are decoded; the first one also compiles.
_CHUNKS = 3


def measure(
  toy: bool,
  height: int,
  width: int,
  budget: float,
  device: jax.Device,
  run: bool,
) -> Row:
  """Plans a chunk of 40 frames, and decodes a few where the device is there.

  Args:
    toy: whether to take a tiny autoencoder.
    height, width: size of the video in pixels.
    budget: bytes that may be taken beyond the weights.
    device: what is compiled for, which need not be there.
    run: whether it is there.

  Returns:
    "case"; "bands", 1 for a whole frame; "estimated GiB", by which the bands
    were planned, and "compiled GiB", of the compiled programs, both beyond the
    weights; "work", FLOPs over those of a whole frame. If it ran, also "peak
    GiB", the most that was held beyond the weights, with "of it by compiling",
    how much of it was held before anything had run; "first s" of the first
    chunk, with compilation; "s a chunk"; and "TFLOP/s" as in `cases.measure`,
    of the work of a whole frame.
  """
  module = dc_ae_v.build(SMALL if toy else LARGE)
  module = module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  plan = bands.plan(
    module,
    height,
    width,
    budget,
    decode=True,
    platform=device.platform,
  )
  size = module.spatial_factor
  video = jax.ShapeDtypeStruct(
    (1, module.chunk_frames, size, size, 3), jnp.float32
  )
  shapes = jax.eval_shape(module.init, jax.random.key(0), video)
  shapes = {"params": {"decoder": shapes["params"]["decoder"]}}
  mesh = sharding.make_mesh({}, [device])
  start = time.perf_counter()
  compiled = autoencoder.measure(
    module, shapes, height, width, plan, mesh, decode=True
  )
  number = 1 if plan.cut is None else bands.count(module, plan, height, True)
  plain = bands.work(module, height, width, decode=True)
  row = {
    "case": f"{height}x{width}",
    "bands": number,
    "estimated GiB": plan.bytes / 2**30,
    "compiled GiB": compiled["bytes"] / 2**30,
    "work": compiled["flops"] / plain,
    "compile s": time.perf_counter() - start,
  }
  return row | _run(module, shapes, height, width, plan, device) if run else row


def _run(module, shapes, height, width, plan, device) -> Row:
  weights: Any = cases.draw(shapes)
  held = sum(x.nbytes for x in jax.tree.leaves(weights))
  compiling = memory.peak_device()
  frames = module.chunk_frames // module.temporal_factor
  size = [-(-n // module.spatial_factor) for n in (height, width)]
  latents = np.random.default_rng(0).standard_normal(
    (1, _CHUNKS * frames, *size, module.latent_channels), np.float32
  )
  seconds = []
  start = time.perf_counter()
  for video in streaming.decode(
    module, weights, [latents], plan=plan, dtype=np.uint8
  ):
    assert video.shape[2:4] == (height, width)
    seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
  once = statistics.median(seconds[1:])
  row: Row = {"first s": seconds[0], "s a chunk": once}
  work = bands.work(module, height, width, decode=True)
  row |= cases.rates(work, 0, once, "bfloat16", device)
  if compiling is not None:
    row["peak GiB"] = ((memory.peak_device() or 0) - held) / 2**30
    row["of it by compiling"] = max(0, compiling - held) / 2**30
  return row
