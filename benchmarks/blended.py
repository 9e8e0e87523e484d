"""The reference's blended spatial tiles, for comparison only.

Overlapping tiles are computed separately and cross-faded, so the result differs
from that of the whole frame near the seams; `streaming` with a plan has no
seams. Follows DC-Gen `dc_videogen/dc_ae_v.py` (commit cae2205) in every detail:
a tile is cross-faded with its neighbour after that one was cross-faded itself,
tiles at the right and bottom edge are smaller, and a stride that is no multiple
of the spatial factor gives a result of the wrong size.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from dcvideogen_jax.models import dc_ae_v, streaming

Variables = dict[str, Any]


def encode(
  module: dc_ae_v.DCAEV,
  variables: Variables,
  video: Float[Array, "b t h w 3"],
  *,
  tile: int,
  overlap: float = 0.25,
) -> Float[np.ndarray, "b tz hz wz c"]:
  """Encodes a whole clip in tiles of `tile` pixels.

  Args:
    module: a chunk_causal model; frames that do not fill a chunk are treated as
      in the reference (`tail="official"` of `streaming`).
    variables: `{"params": ...}`.
    video: float in [-1, 1]. Tiles are padded with zeros to a multiple of
      `spatial_factor`; the latents are cut to height and width // that factor.
    tile: side of a tile in pixels.
    overlap: share of a tile's side that overlaps with the next tile.
  """
  factor = module.spatial_factor
  stride = round((1 - overlap) * tile)

  def run(piece):
    h, w = piece.shape[2:4]
    pad = ((0, 0), (0, 0), (0, -h % factor), (0, -w % factor), (0, 0))
    pieces = streaming.encode(
      module, variables, [np.pad(piece, pad)], tail="official"
    )
    return np.concatenate([*map(np.asarray, pieces)], axis=1)

  latents = tiled(
    np.asarray(video),
    run,
    tile=tile,
    stride=stride,
    out_stride=stride // factor,
    blend=tile // factor - stride // factor,
  )
  h, w = (n // factor for n in video.shape[2:4])
  return latents[:, :, :h, :w]


def decode(
  module: dc_ae_v.DCAEV,
  variables: Variables,
  latents: Float[Array, "b tz hz wz c"],
  *,
  tile: int,
  overlap: float = 0.25,
) -> Float[np.ndarray, "b t h w 3"]:
  """Decodes a whole clip in tiles of `tile` pixels.

  Args:
    module: a chunk_causal model, as for `encode`.
    variables: `{"params": ...}`.
    latents: the latents of the clip.
    tile: side of a tile in pixels of the video.
    overlap: share of a tile's side that overlaps with the next tile.
  """
  factor = module.spatial_factor
  stride = round((1 - overlap) * tile)

  def run(piece):
    pieces = streaming.decode(module, variables, [piece], tail="official")
    return np.concatenate([*pieces], axis=1)

  return tiled(
    np.asarray(latents),
    run,
    tile=tile // factor,
    stride=stride // factor,
    out_stride=stride,
    blend=tile - stride,
  )


def tiled(
  x: np.ndarray,
  run: Callable[[np.ndarray], np.ndarray],
  *,
  tile: int,
  stride: int,
  out_stride: int,
  blend: int,
) -> np.ndarray:
  """Runs a function on overlapping tiles and cross-fades the results.

  Args:
    x: `b t h w c`; tiles are cut from rows and columns.
    run: computes one tile.
    tile: side of an input tile.
    stride: rows and columns from one input tile to the next.
    out_stride: the same for output tiles.
    blend: rows and columns of the output over which neighbours are cross-faded.
  """
  above: list[np.ndarray] = []
  bands = []
  for top in range(0, x.shape[2], stride):
    row: list[np.ndarray] = []
    for left in range(0, x.shape[3], stride):
      piece = run(x[:, :, top : top + tile, left : left + tile])
      if above:
        piece = _cross_fade(above[len(row)], piece, blend, axis=2)
      if row:
        piece = _cross_fade(row[-1], piece, blend, axis=3)
      row.append(piece)
    kept = [piece[:, :, :out_stride, :out_stride] for piece in row]
    bands.append(np.concatenate(kept, axis=3))
    above = row
  return np.concatenate(bands, axis=2)


def _cross_fade(
  before: np.ndarray, after: np.ndarray, extent: int, axis: int
) -> np.ndarray:
  """Fades from the last rows or columns of `before` to the first of `after`."""
  extent = min(before.shape[axis], after.shape[axis], extent)
  take = functools.partial(np.take, axis=axis)
  shape = [1] * after.ndim
  shape[axis] = extent
  ramp = (np.arange(extent) / max(extent, 1)).astype(np.float32).reshape(shape)
  last = range(before.shape[axis] - extent, before.shape[axis])
  faded = take(before, last) * (1 - ramp) + take(after, range(extent)) * ramp
  rest = take(after, range(extent, after.shape[axis]))
  return np.concatenate([faded, rest], axis=axis)
