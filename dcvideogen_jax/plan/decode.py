"""Compiles decoding for a device that is not there."""

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
  """Memory and work of one chunk in the middle of a stream, batch 1.

  Args:
    module: the autoencoder.
    variables: its shapes.
    height, width: of the video in pixels.
    plan: how the chunk is computed.
    mesh: whose devices share the columns.
    streamed: whether another chunk follows.

  Returns:
    `compiled.report` of a chunk. Bytes are those beyond the weights, with what
    waits on the device meanwhile.
  """
  # What `ops.conv3d` chooses on a GPU; here it would choose for this machine.
  module = module.clone(conv3d="xla")
  scale = module.spatial_factor
  shape = (
    1,
    module.chunk_frames // module.temporal_factor,
    -(-height // scale),
    -(-width // scale),
    module.latent_channels,
  )
  model = (module, variables, mesh)
  latents = jax.ShapeDtypeStruct(shape, jnp.float32)
  if plan.cut is None:
    one, _ = compiled.streamed(*model, "decode", latents, dtype=jnp.uint8)
    return compiled.report({"whole": (1, one)})

  coarse, features = compiled.streamed(
    *model, "decode_coarse", latents, cut=plan.cut
  )
  b, t, h, w, c = features.shape
  padded = (b, t, -(-h // plan.rows) * plan.rows, w, c)
  height = shape[2] * scale
  fine, video = compiled.streamed(
    *model,
    "decode_fine",
    jax.ShapeDtypeStruct(padded, features.dtype),
    jax.ShapeDtypeStruct((), jnp.int32),
    collections=("cache", "rows"),
    dtype=jnp.uint8,
    height=height,
    rows=plan.rows,
    cut=plan.cut,
  )
  n = bands.count(module, plan, height, decode=True)
  # What the bands' state takes while a program runs that does not use it.
  kept = fine["cache"] if streamed and not plan.offload else 0
  waiting = {
    "coarse": n * kept,
    # Two bands of video: one is fetched while the next is computed. The state
    # that every band starts from stays too.
    "fine": coarse["cache"]
    + (n - 1) * kept
    + fine["cache"]
    + compiled.size(compiled.place(mesh, video, 3)),
  }
  return compiled.report({"coarse": (1, coarse), "fine": (n, fine)}, waiting)


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
  scale = module.spatial_factor
  shape = (1, 1, height // scale, width // scale, module.latent_channels)
  latents = jax.ShapeDtypeStruct(shape, jnp.float32)
  programs = {
    name: (
      runs,
      compiled.streamed(
        module, variables, mesh, method, latents, dtype=jnp.dtype("uint8")
      )[0],
    )
    for name, method, runs in (
      ("first", "decode", 1),
      ("next", "decode_next", latent_frames - 1),
    )
    if runs
  }
  return compiled.report(programs)
