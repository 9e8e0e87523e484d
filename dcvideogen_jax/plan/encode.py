"""Compiles encoding for a device that is not there."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dcvideogen_jax.models import bands, dc_ae_v, wan_vae
from dcvideogen_jax.plan import compiled


def measure(
  module: dc_ae_v.DCAEV,
  variables: Any,
  height: int,
  width: int,
  plan: bands.BandPlan,
  mesh: Mesh,
  *,
  streamed: bool = True,
) -> dict[str, Any]:
  """Memory and work of one chunk of float video in the middle of a stream.

  Arguments and result as of `decode.measure`.
  """
  # What `ops.conv3d` chooses on a GPU; here it would choose for this machine.
  module = module.clone(conv3d="xla")
  scale = module.spatial_factor
  height, width = (-(-n // scale) * scale for n in (height, width))
  model = (module, variables, mesh)
  frames = module.chunk_frames
  if plan.cut is None:
    video = jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.float32)
    one, _ = compiled.streamed(*model, "encode", video)
    return compiled.report({"whole": (1, one)})

  scale = module.scale_at(plan.cut)
  band = (1, frames, plan.rows * scale, width, 3)
  fine, features = compiled.streamed(
    *model,
    "encode_fine",
    jax.ShapeDtypeStruct(band, jnp.float32),
    jax.ShapeDtypeStruct((), jnp.int32),
    collections=("cache", "rows"),
    height=height,
    cut=plan.cut,
  )
  n = bands.count(module, plan, height, decode=False)
  b, t, rows, w, c = features.shape
  coarse, _ = compiled.streamed(
    *model,
    "encode_coarse",
    jax.ShapeDtypeStruct((b, t, height // scale, w, c), features.dtype),
    cut=plan.cut,
  )
  # What the bands' state takes while a program runs that does not use it, with
  # the state that every band starts from.
  kept = fine["cache"] if streamed and not plan.offload else 0
  waiting = {
    "fine": n * compiled.size(compiled.place(mesh, features, 3))
    + coarse["cache"]
    + (n - 1) * kept
    + fine["cache"],
    "coarse": n * kept + fine["cache"] + fine["rows"],
  }
  return compiled.report({"fine": (n, fine), "coarse": (1, coarse)}, waiting)


def measure_wan(
  module: wan_vae.WanVAE,
  variables: Any,
  height: int,
  width: int,
  latent_frames: int,
  mesh: Mesh,
) -> dict[str, Any]:
  """`measure` of a whole video for Wan's autoencoder, frame by frame."""
  module = module.clone(conv3d="xla")
  programs = {}
  for name, method, frames, runs in (
    ("first", "encode", 1, 1),
    ("next", "encode_next", module.temporal_factor, latent_frames - 1),
  ):
    if runs:
      video = jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.float32)
      found, _ = compiled.streamed(module, variables, mesh, method, video)
      programs[name] = runs, found
  return compiled.report(programs)
