"""Plans how one chunk of DC-AE-V is computed within a memory budget.

The coarse part of the network, the stages from `cut` on, runs on the whole
frame. The fine part runs on bands of rows, whose convolutions keep their last
rows (`chunk_causal.Band`). The plan chooses `cut` and the height of a band from
estimates of memory and work; nothing is compiled or measured.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.models import dc_ae_v
from dcvideogen_jax.models.chunk_causal import FRAMES_KEPT
from dcvideogen_jax.ops.conv3d import api

# Copies of the widest activation that XLA holds at once: the input and its
# padded copy, the output, the shortcut and a layout change. Programs compiled
# for one H100 take 4.2 to 5.3 at the sizes tried (704x1280 to 2176x3840).
LIVE_COPIES = 5.3

# Fraction of the rows kept by an encoder's convolutions that XLA holds twice.
_ROWS_TWICE = 0.5


@dataclasses.dataclass(frozen=True)
class BandPlan:
  """How a chunk is computed; by default without bands.

  Attributes:
    cut: first stage of the coarse part; None computes the chunk whole.
    rows: rows of a band, at the resolution of stage `cut`.
    offload: whether the streaming state of the bands is offloaded to host
      memory between chunks.
    bytes: estimated device memory beyond the weights.
    work: work of the convolutions, relative to computing the chunk whole.
  """

  cut: int | None = None
  rows: int = 0
  offload: bool = False
  bytes: int = 0
  work: float = 1.0


# Factor of the estimated memory by platform. XLA for TPUs copies the inputs of
# convolutions into other layouts: f32t4c32 compiled for v6e took 1.3 to 1.9
# times the estimate.
_OVERHEAD = {"tpu": 1.9}


class _Layer(NamedTuple):
  """A convolution: its stage, resolution, frames and channels."""

  owner: int  # The stage that the convolution belongs to.
  at: int  # The stage whose resolution it runs at.
  frames: int
  inputs: int
  outputs: int


def plan(
  module: dc_ae_v.DCAEV,
  height: int,
  width: int,
  budget: float,
  *,
  decode: bool,
  streamed: bool = True,
  devices: int = 1,
  platform: str | None = None,
) -> BandPlan:
  """Chooses a plan with the least work that fits, then with the highest bands.

  Plans within 5 % of the least work are treated alike; among them, those
  without offloading come first.

  Args:
    module: the model; its dtype and temporal design affect the estimates.
    height, width: size of the video in pixels.
    budget: bytes of a device's memory for everything except the weights.
    decode: whether to plan decoding or encoding.
    streamed: whether state is kept from chunk to chunk.
    devices: devices that share the columns of the picture; each needs the
      memory of a narrower picture.
    platform: platform of the devices; None for the default device's.

  Raises:
    errors.UserError: if no plan fits (the message names the smallest budget
      that would), or if a size is not a positive whole number.
  """
  candidates = _checked(
    module, height, width, decode, streamed, devices, platform
  )
  fitting = [c for c in candidates if c.bytes <= budget]
  if not fitting:
    least = min(c.bytes for c in candidates)
    raise errors.UserError(
      f"{height}x{width} does not fit into {budget / 2**30:.2f} GiB: "
      f"expected at least {least / 2**30:.2f} GiB"
    )
  whole = [c for c in fitting if c.cut is None and not c.offload]
  if whole:
    return whole[0]
  least_work = min(c.work for c in fitting)
  # A few percent more work is accepted for fewer and larger bands.
  near = [c for c in fitting if c.work <= 1.05 * least_work]
  return max(near, key=lambda c: (not c.offload, c.rows * 2 ** (c.cut or 0)))


def least_bytes(
  module: dc_ae_v.DCAEV,
  height: int,
  width: int,
  *,
  decode: bool,
  streamed: bool = True,
  devices: int = 1,
  platform: str | None = None,
) -> int:
  """Returns the smallest budget that has a plan, in bytes.

  Args:
    module, height, width: as for `plan`.
    decode, streamed, devices, platform: as for `plan`.

  Raises:
    errors.UserError: if a size is not a positive whole number.
  """
  candidates = _checked(
    module, height, width, decode, streamed, devices, platform
  )
  return min(c.bytes for c in candidates)


def _checked(
  module, height, width, decode, streamed, devices, platform
) -> list[BandPlan]:
  """Returns every plan, after checking the sizes; arguments as for `plan`."""
  for name, n in (("height", height), ("width", width), ("devices", devices)):
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
      raise errors.UserError(f"{name} must be at least 1, found {n!r}")
  widest = -(-width // (module.spatial_factor * devices))
  widest *= module.spatial_factor
  overhead = _OVERHEAD.get(platform or jax.default_backend(), 1)
  return [
    dataclasses.replace(c, bytes=int(overhead * c.bytes))
    for c in _candidates(module, height, widest, decode, streamed)
  ]


def lag(module: dc_ae_v.DCAEV, cut: int, decode: bool) -> int:
  """Returns the rows by which the fine part's result lags behind its input.

  Args:
    module: the model.
    cut: first stage of the coarse part.
    decode: whether the rows are counted for decoding, in pixels of the video,
      or for encoding, at the resolution of stage `cut`.
  """
  rows = 0
  if decode:
    for s in range(cut - 1, 0, -1):
      rows = (rows + 1) * _step(module, s) + 2 * module.depths[s]
    return 2 * (rows + 1)
  for s in range(cut):
    rows += 2 * module.depths[s] + 1
    rows = -(-rows // _step(module, s))
  return rows


def count(
  module: dc_ae_v.DCAEV, plan: BandPlan, height: int, decode: bool
) -> int:
  """Returns the number of bands, including those that flush the last rows.

  Args:
    module: the model.
    plan: a plan with bands.
    height: rows of the video in pixels.
    decode: whether to count for decoding or for encoding.
  """
  assert plan.cut is not None
  scale = module.scale_at(plan.cut)
  late = lag(module, plan.cut, decode) * (1 if decode else scale)
  return -(-(height + late) // (plan.rows * scale))


def work(
  module: dc_ae_v.DCAEV, height: int, width: int, *, decode: bool
) -> int:
  """Returns the FLOPs of the convolutions of one whole chunk.

  A multiply-add counts as two.

  Args:
    module: the model.
    height, width: size of the video in pixels; rounded up to whole latents.
    decode: whether to count the decoder or the encoder.
  """
  size = module.spatial_factor
  height, width = (-(-n // size) * size for n in (height, width))
  per_position = sum(
    x.inputs * x.outputs * x.frames / module.scale_at(x.at) ** 2
    for x in _layers(module, decode)
  )
  return round(2 * 27 * per_position * height * width)


def _step(module, stage: int) -> int:
  """Returns the rows of a stage per row of the next coarser one."""
  return module.scale_at(stage + 1) // module.scale_at(stage)


def _candidates(
  module: dc_ae_v.DCAEV, height: int, width: int, decode: bool, streamed: bool
) -> Iterator[BandPlan]:
  """Yields every plan to compute a chunk, with its memory and work."""
  size = module.spatial_factor
  height, width = (-(-n // size) * size for n in (height, width))
  layers = list(_layers(module, decode))
  # Attributes of a module are slow to look up.
  scales = [module.scale_at(s) for s in range(len(module.widths))]
  itemsize = jnp.dtype(module.dtype).itemsize
  kept = FRAMES_KEPT[module.time] if streamed else 0
  video = 3 * module.chunk_frames * height * width

  def work(some):
    """Returns the multiply-adds of layers, up to a common factor."""
    return sum(
      x.inputs * x.outputs * x.frames / scales[x.at] ** 2 for x in some
    )

  def area(x, pixel_rows, extra=0):
    """Returns the positions of a layer in these rows and some extra rows."""
    scale = scales[x.at]
    return (pixel_rows // scale + extra) * (width // scale)

  def live(some, pixel_rows, kept_rows=0):
    """Returns the numbers that XLA holds at once while it computes layers."""
    widest = max(
      x.frames
      * max(
        x.inputs * area(x, pixel_rows, kept_rows),
        x.outputs * area(x, pixel_rows),
      )
      for x in some
    )
    # A larger convolution is computed in bands, and its result concatenated.
    return (LIVE_COPIES + (widest > api.MAX_ELEMENTS)) * widest

  def state(some, pixel_rows):
    """Returns the numbers in the cached frames of layers."""
    return sum(kept * x.inputs * area(x, pixel_rows) for x in some)

  def twice(some, lines=0):
    """Returns the numbers that an encoder holds in a second layout."""
    if decode:
      return 0  # LIVE_COPIES includes a decoder's.
    return 27 * sum(x.inputs * x.outputs for x in some) + _ROWS_TWICE * lines

  used = live(layers, height) + state(layers, height) + video + twice(layers)
  yield BandPlan(bytes=round(used * itemsize))

  for cut in range(1, len(module.widths)):
    fine = [x for x in layers if x.owner < cut]
    coarse = [x for x in layers if x.owner >= cut]
    scale, fine_work, all_work = scales[cut], work(fine), work(layers)
    late = lag(module, cut, decode) * (1 if decode else scale)
    # Features between the two parts, and the rows that convolutions keep.
    features = max(x.inputs * x.frames * area(x, height) for x in coarse)
    lines = sum(2 * x.inputs * (x.frames + 1) * area(x, 0, 1) for x in fine)
    for rows in _divisions(height // scale):
      pixels = rows * scale
      banded = live(fine, pixels, 2) + lines + state(fine, pixels)
      banded += 2 * video * pixels // height + twice(fine, lines)
      used = max(banded, live(coarse, height) + twice(coarse)) + features
      used += state(coarse, height)
      bands = -(-(height + late) // pixels)
      redone = bands * pixels / height - 1
      for offload in (False, True) if kept else (False,):
        resident = 0 if offload else state(fine, height)
        yield BandPlan(
          cut,
          rows,
          offload,
          round((used + resident) * itemsize),
          1 + redone * fine_work / all_work,
        )


def _divisions(rows: int) -> list[int]:
  """Returns the heights that divide the rows into 1, 2, 3, ... bands."""
  return sorted({-(-rows // n) for n in range(1, rows + 1)})


def _layers(module: dc_ae_v.DCAEV, decode: bool) -> Iterator[_Layer]:
  """Yields the convolutions of the encoder or the decoder, fine to coarse."""
  m = module
  coarsest = len(m.widths) - 1
  latent_frames = m.chunk_frames // m.temporal_factor
  frames = [m.chunk_frames] * coarsest + [latent_frames]
  if decode:
    yield _Layer(0, 1, frames[1], m.widths[1], 12)
  else:
    yield _Layer(0, 0, frames[0], 3, m.widths[1] // 4)
  for s in range(1, coarsest + 1):
    for _ in range(2 * m.depths[s]):
      yield _Layer(s, s, frames[s], m.widths[s], m.widths[s])
    if s == coarsest:
      break
    factor = m.temporal_factor if s == coarsest - 1 else 4
    if decode:
      up = m.widths[s + 1], factor * m.widths[s]
      yield _Layer(s, s + 1, frames[s + 1], *up)
    else:
      yield _Layer(s, s, frames[s], m.widths[s], m.widths[s + 1] // factor)
  ends = (m.latent_channels, m.widths[-1])
  yield _Layer(
    coarsest, coarsest, latent_frames, *(ends if decode else ends[::-1])
  )
