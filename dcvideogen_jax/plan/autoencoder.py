"""Compiles encoding and decoding for devices that are not present."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dcvideogen_jax import sharding
from dcvideogen_jax.models import bands, dc_ae_v, wan_vae
from dcvideogen_jax.plan import compiled, hardware

_BANDS = ("cache", "rows")  # Flax collections with the state of bands.


def measure(
  module: dc_ae_v.DCAEV,
  variables: Any,
  height: int,
  width: int,
  plan: bands.BandPlan,
  mesh: Mesh,
  *,
  decode: bool,
  streamed: bool = True,
) -> dict[str, Any]:
  """Compiles one chunk in the middle of a stream; returns memory and work.

  The batch is 1.

  Args:
    module: the autoencoder.
    variables: the shapes of its variables.
    height, width: size of the video in pixels.
    plan: how the chunk is cut into bands.
    mesh: its devices share the columns.
    decode: whether latents become uint8 video; otherwise float32 video becomes
      latents.
    streamed: whether another chunk follows.

  Returns:
    `compiled.report` of a chunk. Bytes exclude the weights, and include arrays
    that stay on the device while a program runs that does not use them.
  """
  # `ops.conv3d` would choose for this machine. On a GPU it chooses "xla".
  module = module.clone(conv3d="xla")
  scale, frames = module.spatial_factor, module.chunk_frames
  rows, columns = -(-height // scale), -(-width // scale)
  height, width = rows * scale, columns * scale
  model = (module, variables, mesh)
  latents = _floats(
    frames // module.temporal_factor, rows, columns, module.latent_channels
  )
  cut, dtype = plan.cut, jnp.dtype("uint8") if decode else None
  if cut is None:
    method = "decode" if decode else "encode"
    x = latents if decode else _floats(frames, height, width, 3)
    one, _ = compiled.streamed(*model, method, x, dtype=dtype)
    return compiled.report({"whole": (1, one)})
  n = bands.count(module, plan, height, decode=decode)
  top = jax.ShapeDtypeStruct((), jnp.int32)
  options = {"collections": _BANDS, "height": height, "cut": cut}
  if decode:
    coarse, features = compiled.streamed(
      *model, "decode_coarse", latents, cut=cut
    )
    padded = -(-features.shape[2] // plan.rows) * plan.rows
    x = _with_rows(features, padded)
    options |= {"rows": plan.rows, "dtype": dtype}
    fine, made = compiled.streamed(*model, "decode_fine", x, top, **options)
  else:
    scale = module.scale_at(cut)
    x = _floats(frames, plan.rows * scale, width, 3)
    fine, made = compiled.streamed(*model, "encode_fine", x, top, **options)
    x = _with_rows(made, height // scale)
    coarse, _ = compiled.streamed(*model, "encode_coarse", x, cut=cut)
  # Bytes of a band's cache that stay on the device while another program runs.
  # "waiting" below also counts the empty state that every band starts from.
  kept = fine["cache"] if streamed and not plan.offload else 0
  # In decoding one band of video waits here, as it is fetched to the host while
  # the next one is computed. In encoding the features of all bands are kept.
  results = (1 if decode else n) * compiled.size(compiled.place(mesh, made, 3))
  waiting = {
    "coarse": n * kept + (0 if decode else fine["cache"] + fine["rows"]),
    "fine": coarse["cache"] + (n - 1) * kept + fine["cache"] + results,
  }
  programs = {"coarse": (1, coarse), "fine": (n, fine)}
  order = ("coarse", "fine") if decode else ("fine", "coarse")
  return compiled.report({name: programs[name] for name in order}, waiting)


def measure_wan(
  module: wan_vae.WanVAE,
  variables: Any,
  height: int,
  width: int,
  latent_frames: int,
  mesh: Mesh,
  *,
  decode: bool,
) -> dict[str, Any]:
  """Compiles Wan's autoencoder, which runs frame by frame, for a whole video.

  Args:
    module: the autoencoder.
    variables: the shapes of its variables.
    height, width: size of the video in pixels.
    latent_frames: number of latent frames of the video.
    mesh: its devices share the columns.
    decode: whether latents become uint8 video; otherwise float32 video becomes
      latents.

  Returns:
    `compiled.report` of the video. Bytes exclude the weights.
  """
  module = module.clone(conv3d="xla")
  scale = module.spatial_factor
  method, dtype = "encode", None
  latents = _floats(1, height // scale, width // scale, module.latent_channels)
  if decode:
    method, dtype = "decode", jnp.dtype("uint8")
  programs = {}
  for name, suffix, frames, runs in (
    ("first", "", 1, 1),
    ("next", "_next", module.temporal_factor, latent_frames - 1),
  ):
    x = latents if decode else _floats(frames, height, width, 3)
    if runs:
      one, _ = compiled.streamed(
        module, variables, mesh, method + suffix, x, dtype=dtype
      )
      programs[name] = (runs, one)
  return compiled.report(programs)


def decodings(
  variant: str,
  size: tuple[int, int],
  budgets: Mapping[str, float],
  dtype: str,
  target: hardware.Target,
  whole: bool = True,
  fast: bool = False,
) -> Iterator[dict[str, Any]]:
  """Compiles the decoding of a chunk within memory budgets.

  Args:
    variant: a variant of DC-AE-V.
    size: height and width of the video in pixels.
    budgets: GiB of memory beyond the weights, by a name for each budget.
    dtype: dtype of the weights and the computation.
    target: its devices share the columns.
    whole: whether to add decoding without bands, for comparison.
    fast: whether to plan the variant's fast decoder, of `dc_ae_v.FAST`.

  Returns:
    An iterator over rows, each compiled when it is asked for. A row has
    "budget", its name; "plan"; "fits"; and either the entries of
    `compiled.report` and "work", the FLOPs relative to decoding without bands,
    or "too_large".

  Raises:
    errors.UserError: if no plan keeps a budget.
  """
  kind = jnp.dtype(dtype)
  part = compiled.part(
    "dc_ae_v_decoder" if fast else "dc_ae_v",
    variant,
    dtype=kind,
    param_dtype=kind,
  )
  mesh = sharding.make_mesh({"spatial": -1}, target.devices)
  plans = {
    f"{name} GiB": bands.plan(
      part.module,
      *size,
      budget * 2**30,
      decode=True,
      devices=sharding.num_shards(mesh, "columns"),
      platform=target.devices[0].platform,
    )
    for name, budget in budgets.items()
  }
  if whole:
    plans["whole"] = bands.BandPlan()
  plain = bands.work(part.module, *size, decode=True)

  def decoding(name, plan):
    row = {"budget": name, "plan": vars(plan), "fits": name == "whole"}
    try:
      found = measure(*part, *size, plan, mesh, decode=True)
    except compiled.TooLarge as e:
      return row | {"too_large": str(e)}
    if name != "whole":
      limit = budgets[name.removesuffix(" GiB")] * 2**30
      row["fits"] = found["bytes"] <= limit
    return {**row, "work": found["flops"] / plain, **found}

  return (decoding(*item) for item in plans.items())


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def _with_rows(x: Any, rows: int) -> jax.ShapeDtypeStruct:
  """Returns the shape `b t h w c` of `x` with another h."""
  return jax.ShapeDtypeStruct((*x.shape[:2], rows, *x.shape[3:]), x.dtype)
