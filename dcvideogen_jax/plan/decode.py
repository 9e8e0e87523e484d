"""Compiles the decoding of one DC-AE-V chunk for a device that is not there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax.models import bands, dc_ae_v, streaming
from dcvideogen_jax.plan import flops


def measure(
  module: dc_ae_v.DCAEV, height: int, width: int, plan: bands.Plan, device: Any
) -> dict[str, Any]:
  """Memory and work of one chunk in the middle of a stream, batch 1.

  Args:
    module: the autoencoder.
    height, width: of the video in pixels.
    plan: how the chunk is computed.
    device: from `hardware.gpu`.

  Returns:
    `programs`: by name, how often it runs per chunk, its FLOPs and its bytes
    of arguments (weights left out), outputs, temporaries and aliases.
    `bytes`: the peak beyond the weights over the whole chunk: what a program
    uses and what waits on the device meanwhile. `flops`: of the whole chunk.
  """
  # What `ops.conv3d` chooses on a GPU; here it would choose for this machine.
  module = module.clone(conv3d="xla")
  size = module.spatial_factor
  shape = (
    1,
    module.chunk_frames // module.temporal_factor,
    -(-height // size),
    -(-width // size),
    module.latent_channels,
  )
  place = functools.partial(_place, device)
  latents = place(jax.ShapeDtypeStruct(shape, jnp.float32))
  variables = place(
    jax.eval_shape(module.init, jax.random.key(0), _video(module))
  )
  compile_ = functools.partial(_compile, module, variables, place)
  if plan.cut is None:
    one, _ = compile_("decode", latents, dtype=jnp.uint8)
    return _report({"whole": (1, one)}, {})

  static = {"cut": plan.cut}
  coarse, features = compile_("decode_coarse", latents, **static)
  b, t, h, w, c = features.shape
  padded = (b, t, -(-h // plan.rows) * plan.rows, w, c)
  features = place(jax.ShapeDtypeStruct(padded, features.dtype))
  height = shape[2] * size
  fine, _ = compile_(
    "decode_fine",
    features,
    place(jax.ShapeDtypeStruct((), jnp.int32)),
    collections=("cache", "rows"),
    dtype=jnp.uint8,
    height=height,
    rows=plan.rows,
    **static,
  )
  n = bands.count(module, plan, height, decode=True)
  programs = {"coarse": (1, coarse), "fine": (n, fine)}
  # What the bands' state takes while a program runs that does not use it.
  others = 0 if plan.offload else fine["cache"]
  waiting = {
    "coarse": n * others,
    # Two bands of video: one is fetched while the next is computed.
    "fine": coarse["cache"] + (n - 1) * others + fine["video"],
  }
  return _report(programs, waiting)


def _video(module):
  size = module.spatial_factor
  shape = (1, module.frames_multiple, size, size, 3)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _place(device, tree):
  sharding = jax.sharding.SingleDeviceSharding(device)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def _size(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _compile(
  module, variables, place, method, x, *args, collections=("cache",), **static
):
  """Compiles one call of `streaming`; returns its figures and its output."""
  shapes = {k: v for k, v in static.items() if k != "dtype"}
  state = place(
    jax.eval_shape(
      functools.partial(
        streaming.empty_state,
        module,
        method,
        collections=collections,
        **shapes,
      ),
      variables,
      x,
      *args,
    )
  )
  # Weights are not counted: a call takes those that it uses, and all stay.
  traced = streaming.apply.trace(
    module, method, variables, x, *args, state=state, **static
  )
  memory = (
    traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
  )
  figures = {
    "flops": flops.count(traced.jaxpr.jaxpr),
    "arguments": _size((x, args, state)),
    "outputs": memory.output_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
    "cache": _size(state["cache"]),
    "video": _size(traced.out_info[0]),
  }
  return figures, traced.out_info[0]


def _report(programs, waiting) -> dict[str, Any]:
  peak = 0
  for name, (_, p) in programs.items():
    used = p["arguments"] + p["outputs"] + p["temporaries"] - p["aliased"]
    peak = max(peak, used + waiting.get(name, 0))
  return {
    "bytes": peak,
    "flops": sum(n * p["flops"] for n, p in programs.values()),
    "programs": {name: {"runs": n, **p} for name, (n, p) in programs.items()},
  }
