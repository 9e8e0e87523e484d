"""Encodes and decodes video of any length and size in bounded memory.

Clips pass chunk by chunk through one compiled function. A plan may compute each
chunk in bands of rows: the coarse part of the network on all rows, the fine
part band by band through another compiled function. The result equals that of
the whole clip and the whole frame, up to float rounding.

Video comes in pieces (b, t, h, w, 3) of any number of frames, uint8 in 0..255
or float in [-1, 1], so that a long file is never held in memory as a whole.

Under `jax.set_mesh`, every device computes its own columns of the picture, of
whole chunks and of bands, and holds their state (`layers.constrain_columns`).
The weights should be on all devices of the mesh. Several processes must be
given the same video, and each gets the whole result.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dcvideogen_jax import errors, levels, memory, sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import bands, calls, dc_ae_v, pieces

Variables = dict[str, Any]
WHOLE = bands.BandPlan()

_OF_BANDS = ("cache", "rows")
TAILS = ("pad", "official")


def encode(
  module: dc_ae_v.DCAEV,
  variables: Variables,
  video: Iterable[Any],
  *,
  plan: bands.BandPlan = WHOLE,
  tail: str = "pad",
  eager: bool = False,
) -> Iterator[Float[Array, "b tz hz wz c"]]:
  """Encodes a video of any length chunk by chunk.

  Args:
    module: a chunk_causal or causal model.
    variables: `{"params": ...}`.
    video: pieces (b, t, h, w, 3), in order. Rows and columns are padded to a
      multiple of `spatial_factor` by repeating the edge.
    plan: how a chunk is computed; from `bands.plan`.
    tail: treatment of frames that do not fill a chunk. "pad" repeats the last
      frame. "official", as in the reference, has ordinary zero padding in time
      and no state, and needs a multiple of `temporal_factor` frames.
    eager: whether to encode a chunk as soon as its frames have arrived. Waiting
      for the next piece lets the last chunk free its state early.

  Yields:
    The latents of each chunk, unscaled.

  Raises:
    errors.UserError: if the plan does not fit the model, the tail is unknown or
      does not allow the number of frames, or a piece is not a video.
    ValueError: if there are no frames or the pieces do not fit together.
  """
  _check(module, plan, tail)
  step = _encode_whole if plan.cut is None else _encode_banded
  state, seen = None, 0
  video = (pieces.require_video(piece) for piece in video)
  chunks = pieces.regroup(video, module.chunk_frames, eager)
  for piece, last in memory.bounded(chunks):
    seen += piece.shape[1]
    chunk = dc_ae_v.pad_edge(piece, 1, module.spatial_factor)
    if chunk.shape[1] < module.chunk_frames:
      if tail == "official":
        if seen % module.temporal_factor:
          raise errors.UserError(
            "the official rule for frames that do not fill a chunk needs a "
            f"multiple of {module.temporal_factor} frames, found {seen}"
          )
        # Fewer frames than a chunk's need no plan to fit into memory.
        yield _unchunked(module, "encode", variables, calls.put(chunk))
        return
      chunk = dc_ae_v.pad_edge(chunk, module.chunk_frames)
    latents, state = step(module, variables, chunk, state, plan, last)
    yield latents


def decode(
  module: dc_ae_v.DCAEV,
  variables: Variables,
  latents: Iterable[Any],
  *,
  plan: bands.BandPlan = WHOLE,
  tail: str = "pad",
  dtype: Any = np.float32,
  eager: bool = False,
) -> Iterator[np.ndarray]:
  """Decodes latents of any length chunk by chunk.

  Args:
    module: a chunk_causal or causal model.
    variables: `{"params": ...}`.
    latents: pieces (b, t, h, w, c), in order, unscaled.
    plan: how a chunk is computed; from `bands.plan`.
    tail: "pad" repeats the last latent frame to fill a chunk, and cuts the
      surplus video off; "official" as in `encode`.
    dtype: dtype of the video; uint8 is clipped and rounded.
    eager: as in `encode`.

  Yields:
    The video of each chunk, (b, t, h, w, 3), in host memory.

  Raises:
    errors.UserError: if the plan, tail or channels do not fit the model.
    ValueError: if there are no latents or the pieces do not fit together.
  """
  _check(module, plan, tail)
  dtype = np.dtype(dtype)
  frames = module.chunk_frames // module.temporal_factor
  step = _decode_whole if plan.cut is None else _decode_banded
  state = None
  chunks = pieces.regroup(latents, frames, eager, noun="latents")
  for chunk, last in memory.bounded(chunks):
    pieces.require_latents(chunk, module)
    found = chunk.shape[1]
    if found < frames:
      if tail == "official":
        video = _unchunked(module, "decode", variables, calls.put(chunk))
        yield sharding.to_host(calls.from_float(video, dtype))
        return
      chunk = dc_ae_v.pad_edge(chunk, frames)
    video, state = step(module, variables, chunk, state, plan, last, dtype)
    yield video[:, : found * module.temporal_factor]


def _check(module: dc_ae_v.DCAEV, plan: bands.BandPlan, tail: str) -> None:
  """Raises UserError if the plan does not fit or the tail is unknown."""
  if tail not in TAILS:
    raise errors.UserError(
      f"tail must be one of {', '.join(TAILS)}, found {tail!r}"
    )
  stages = len(module.widths)
  if plan.cut is not None and not (1 <= plan.cut < stages and plan.rows > 0):
    raise errors.UserError(
      f"a plan cuts at a stage from 1 to {stages - 1} into bands of 1 row or "
      f"more, found stage {plan.cut} and {plan.rows} rows"
    )


def _encode_whole(module, variables, video, state, plan, last):
  del plan, last
  args = (module, "encode", variables, calls.put(video))
  return calls.apply(*args, state=state or calls.empty_state(*args))


def _decode_whole(module, variables, latents, state, plan, last, dtype):
  del plan, last
  args = (module, "decode", variables, calls.put(latents))
  video, state = calls.apply(
    *args, state=state or calls.empty_state(*args), dtype=dtype
  )
  return sharding.to_host(video), state


def _encode_banded(module, variables, video, state, plan, last):
  """Runs fine stages on bands of the video, then coarse stages on all rows."""
  b, t, height, width, _ = video.shape
  scale = module.scale_at(plan.cut)
  late = bands.lag(module, plan.cut, decode=False)
  n = bands.count(module, plan, height, decode=False)
  rows = plan.rows * scale

  def band(i):
    """Returns a band of the video; rows below the video are zeros."""
    piece = video[:, :, i * rows : (i + 1) * rows]
    missing = rows - piece.shape[2]
    return calls.put(
      np.pad(piece, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
    )

  static = {"height": height, "cut": plan.cut}
  args = (module, "encode_fine", variables)
  if state is None:
    shapes = calls.state_shapes(
      *args, band(0), 0, collections=_OF_BANDS, **static
    )
    state = _Bands(None, [None] * n, shapes)
  coarse, fine, empty = state
  lines, features = calls.empty(empty, "rows"), None
  for i in range(n):
    x, new = calls.apply(
      *args,
      band(i),
      i,
      state={"cache": _loaded(fine[i], empty), "rows": lines},
      **static,
    )
    fine[i], lines = _stored(new["cache"], plan, last), new["rows"]
    if features is None:
      shape = (b, x.shape[1], n * plan.rows, width // scale, x.shape[-1])
      features = calls.zeros(jax.ShapeDtypeStruct(shape, x.dtype))
    features = _put_rows(features, x, i * plan.rows)
  features = features[:, :, late : late + height // scale]

  args = (module, "encode_coarse", variables, features)
  coarse = coarse or calls.empty_state(*args, cut=plan.cut)
  latents, coarse = calls.apply(*args, state=coarse, cut=plan.cut)
  return latents, _Bands(coarse, fine, empty)


def _decode_banded(module, variables, latents, state, plan, last, dtype):
  """Runs coarse stages on all rows, then fine stages on bands of the result."""
  height = latents.shape[2] * module.spatial_factor
  n = bands.count(module, plan, height, decode=True)
  rows = plan.rows * module.scale_at(plan.cut)

  args = (module, "decode_coarse", variables, calls.put(latents))
  coarse = state.coarse if state else calls.empty_state(*args, cut=plan.cut)
  features, coarse = calls.apply(*args, state=coarse, cut=plan.cut)
  features = _pad_rows(features, plan.rows)

  static = {"height": height, "cut": plan.cut, "rows": plan.rows}
  args = (module, "decode_fine", variables, features)
  if state is None:
    shapes = calls.state_shapes(*args, 0, collections=_OF_BANDS, **static)
    state = _Bands(coarse, [None] * n, shapes)
  _, fine, empty = state
  lines = calls.empty(empty, "rows")
  late = bands.lag(module, plan.cut, decode=True)
  video = None
  previous = None
  for i in range(n + 1):
    done, previous = previous, None
    if i < n:
      piece, new = calls.apply(
        *args,
        i,
        state={"cache": _loaded(fine[i], empty), "rows": lines},
        dtype=dtype,
        **static,
      )
      fine[i], lines = _stored(new["cache"], plan, last), new["rows"]
      previous = (i * rows - late, piece)
    if done is None:
      continue
    # One band is fetched while the next is computed.
    start, piece = done[0], sharding.to_host(done[1])
    if video is None:
      shape = (*piece.shape[:2], height, *piece.shape[3:])
      video = np.empty(shape, piece.dtype)
    first, end = max(start, 0), min(start + rows, height)
    if first < end:
      video[:, :, first:end] = piece[:, :, first - start : end - start]
  return video, _Bands(coarse, fine, empty)


class _Bands(NamedTuple):
  """The streaming state between two chunks that are computed in bands.

  Attributes:
    coarse: state of the coarse part; None before the first chunk.
    fine: state of each band, or None before the first chunk.
    empty: shapes of a band's state, by collection.
  """

  coarse: Any
  fine: list[Any]
  empty: dict[str, Any]


class _Offloaded(NamedTuple):
  """A band's state in host memory; `where` is None for uncommitted arrays."""

  leaves: list[np.ndarray]
  where: list[Any]


def _stored(cache, plan: bands.BandPlan, last: bool):
  """Returns a band's state to keep between chunks, offloaded if planned."""
  if last or not plan.offload:
    return None if last else cache
  leaves = jax.tree.leaves(cache)
  if not leaves[0].is_fully_addressable:
    raise errors.UserError(
      "bands cannot be offloaded to the host when several processes share a "
      "picture: expected a larger memory budget or devices of one process"
    )
  where = [x.sharding if x.committed else None for x in leaves]
  return _Offloaded(jax.device_get(leaves), where)


def _loaded(cache, empty):
  """Returns a band's state on the devices; zeros before the first chunk."""
  if cache is None:
    return calls.empty(empty, "cache")
  if not isinstance(cache, _Offloaded):
    return cache
  leaves = [
    x if where is None else jax.device_put(x, where)
    for x, where in zip(*cache, strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(empty["cache"]), leaves)


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(x, rows, start):
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis=2)


@functools.partial(jax.jit, static_argnums=1)
def _pad_rows(x, multiple):
  pad = ((0, 0), (0, 0), (0, -x.shape[2] % multiple), (0, 0), (0, 0))
  return jnp.pad(x, pad)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unchunked(module, method, variables, x):
  return module.unchunked().apply(variables, levels.to_float(x), method=method)
