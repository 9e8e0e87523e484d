"""Encodes and decodes a video or an image in bounded memory, and compares."""

import collections
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
import tqdm
from jaxtyping import UInt8

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax import errors, files, memory, provenance
from dcvideogen_jax.data import stills
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.eval import comparison as comparison_lib
from dcvideogen_jax.models import bands, dc_ae_v, streaming

_UNKNOWN_FPS = 16.0


class Input(NamedTuple):
  """A video or an image as the autoencoder sees it: resized and cut.

  Attributes:
    path: the file.
    height: pixels, after resizing.
    width: pixels, after resizing.
    frames: number of frames to read, by the file's header, which may be wrong.
    fps: frames per second; None for an image.
    max_frames: limit on the frames that are read; None reads all.
  """

  path: str
  height: int
  width: int
  frames: int
  fps: float | None
  max_frames: int | None


def probe(
  path: str,
  max_frames: int | None = None,
  height: int | None = None,
  width: int | None = None,
) -> Input:
  """Reads the size and frame rate of a video or an image.

  Args:
    path: a video or an image.
    max_frames: limit on the frames that will be read; None reads all.
    height: pixels to resize to. If only one of height and width is given, the
      other keeps the aspect ratio.
    width: pixels to resize to.

  Raises:
    errors.UserError: if it is missing, damaged or empty.
  """
  if video_files.is_image(path):
    rows, columns = stills.read(path).shape[:2]
    frames, fps = 1, None
  else:
    info = video_files.probe(path)
    rows, columns, frames = info.height, info.width, info.frames
    fps = info.fps or _UNKNOWN_FPS
  if height or width:
    height = height or max(1, round(rows * width / columns))
    width = width or max(1, round(columns * height / rows))
    rows, columns = height, width
  return Input(
    path, rows, columns, min(frames, max_frames or frames), fps, max_frames
  )


def checked(source: Input, module: dc_ae_v.DCAEV, rule: str) -> Input:
  """Checks the number of frames, counting them where the result needs that.

  Args:
    source: from `probe`.
    module: the autoencoder.
    rule: "pad" fills the last chunk; "official" refuses a number of frames that
      is no multiple of the temporal compression factor.

  Returns:
    The source; for a non-causal autoencoder with the counted number of frames.

  Raises:
    errors.UserError: if the official rule does not take that many frames.
  """
  if source.fps is not None and module.time == "non_causal":
    # The model sees the whole clip as one chunk, whose length must be right: a
    # container may claim another number of frames than it has.
    shown = itertools.islice(video_files.frames(source.path), source.max_frames)
    source = source._replace(frames=sum(1 for _ in shown))
  _check_frames(source, source.frames, module, rule)
  return source


def _frames(source: Input) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """Yields the frames of the input, resized."""
  size = (source.height, source.width)
  if source.fps is not None:
    yield from video_files.read_frames(
      source.path, max_frames=source.max_frames, size=size
    )
    return
  image = PIL.Image.fromarray(stills.read(source.path))
  if image.size != size[::-1]:
    image = image.resize(size[::-1], PIL.Image.Resampling.BICUBIC)
  yield np.asarray(image)


def _check_frames(
  source: Input, frames: int, module: dc_ae_v.DCAEV, rule: str
) -> None:
  """Raises UserError if the official rule does not take that many frames."""
  factor = module.temporal_factor
  if source.fps is None or rule == "pad" or frames % factor == 0:
    return
  raise errors.UserError(
    f"{source.path} gives {frames} frames, but --frames_rule=official needs a"
    f" multiple of {factor}: use --frames_rule=pad, or --max_frames="
    f"{frames // factor * factor or factor}"
  )


def _for_clip(module: dc_ae_v.DCAEV, source: Input) -> dc_ae_v.DCAEV:
  """Returns a module that can be streamed and computes the same for this clip.

  An image is a clip of `temporal_factor` equal frames with zeros before and
  after it, as in the reference. A non_causal model sees zeros around the whole
  clip. Both equal a chunk_causal model with a single chunk.
  """
  if source.fps is not None and module.time != "non_causal":
    return module
  factor = module.temporal_factor
  time = "causal" if module.time == "causal" else "chunk_causal"
  frames = -(-source.frames // factor) * factor
  return module.clone(chunk_frames=frames, time=time)


def _plans(modules, source, budget, devices) -> dict[str, bands.BandPlan]:
  """Plans how chunks are encoded and decoded within the memory budget."""
  if budget is None:
    budget = memory.SHARE * memory.free_on_all()
  return {
    name: bands.plan(
      module,
      source.height,
      source.width,
      budget,
      decode=name == "decode",
      streamed=source.frames > module.chunk_frames,
      devices=devices,
    )
    for name, module in zip(("encode", "decode"), modules, strict=True)
  }


def write(
  directory: str | os.PathLike[str],
  module: dc_ae_v.DCAEV,
  variables: streaming.Variables,
  source: Input,
  *,
  title: str,
  settings: Mapping[str, Any],
  clock: clock_lib.Clock,
  rule: str = "pad",
  crf: int = 18,
  budget: float | None = None,
  devices: int = 1,
  on_frames: Callable[[int], None] = lambda count: None,
  decoder: dc_ae_v.DCAEV | None = None,
) -> dict[str, Any]:
  """Reconstructs a video or image; writes videos, a sheet and metrics.json.

  Args:
    directory: an existing folder.
    module: the autoencoder.
    variables: its parameters.
    source: from `checked`.
    title: title of the contact sheet.
    settings: what determines the result; stored in metrics.json and in the
      videos.
    clock: times the phases.
    rule: "pad" or "official"; see `checked`.
    crf: quality of the videos; 0 is the best.
    budget: device memory in bytes for everything but the weights; None takes
      `memory.SHARE` of the free memory.
    devices: number of devices that share the columns of a frame.
    on_frames: called after each chunk with the number of frames so far.
    decoder: decodes instead of `module`; its parameters are in `variables`.

  Returns:
    The content of metrics.json.

  Raises:
    errors.UserError: if a file cannot be read or written, the budget is too
      small, or the official rule does not take the number of frames.
  """
  modules = [_for_clip(m, source) for m in (module, decoder or module)]
  plans = _plans(modules, source, budget, devices)
  told = {name: vars(plan) for name, plan in plans.items()}
  settings = {**settings, "plans": told}
  comparison = comparison_lib.Comparison(
    directory,
    title,
    frames=source.frames,
    fps=source.fps,
    crf=crf,
    comment=json.dumps(settings),
  )
  with clock.phase("compare and write"), comparison:
    numbers = _stream(
      modules, variables, source, plans, comparison, rule, clock, on_frames
    )
  metrics = provenance.report(
    clock,
    input=source._asdict(),
    **comparison.metrics(),
    compression=numbers,
    settings=settings,
  )
  with files.atomic(pathlib.Path(directory) / "metrics.json") as path:
    path.write_text(provenance.to_json(metrics), encoding="utf-8")
  return metrics


def _stream(
  modules, variables, source, plans, comparison, rule, clock, on_frames
):
  """Runs the frames through the model; returns sizes and compression ratios."""
  module, decoder = modules
  waiting: collections.deque[np.ndarray] = collections.deque()
  values = collections.Counter()

  def pieces():
    count = 0
    for frame in clock.over("read", _frames(source)):
      waiting.append(frame)
      count += 1
      yield frame[None, None]
    _check_frames(source, count, module, rule)
    for _ in range(-count % module.temporal_factor):
      yield frame[None, None]
    values["input"] = count * frame.size

  def latents():
    encoded = streaming.encode(
      module, variables, pieces(), plan=plans["encode"], tail=rule
    )
    for latent in encoded:
      values["latent"] += latent.size
      values["latent_frames"] += latent.shape[1]
      yield jax.block_until_ready(latent)

  decoded = streaming.decode(
    decoder,
    variables,
    clock.over("encode", latents()),
    plan=plans["decode"],
    tail=rule,
    dtype=np.uint8,
  )
  done = 0
  with tqdm.tqdm(total=source.frames, unit="frame", disable=None) as progress:
    for chunk in clock.over("decode", decoded):
      originals = [
        waiting.popleft() for _ in range(min(len(waiting), chunk.shape[1]))
      ]
      n = len(originals)
      comparison.add(
        np.stack(originals), chunk[0, :n, : source.height, : source.width]
      )
      progress.update(n)
      done += n
      on_frames(done)
  assert not waiting
  return {
    **values,
    "ratio": values["input"] / values["latent"],
    "nominal_ratio": 3
    * module.spatial_factor**2
    * module.temporal_factor
    / module.latent_channels,
  }
