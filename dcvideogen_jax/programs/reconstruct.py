"""Encodes and decodes a video or an image, and says how well that went.

  python -m launch.reconstruct --model=tiny --input=clip.mp4 --output=out

With --spatial=N so many devices share each picture, also those of several
processes, started as `launch.train`'s are. The result is the same.

Writes into `--output`, all at the end and all or nothing:
  reconstruction.mp4   of the input's size, length and rate (.png for an image)
  side_by_side.mp4     the input on the left (.png for an image)
  contact_sheet.png    frames, reconstructions and error maps
  metrics.json         PSNR and SSIM per frame, settings, time, memory, versions

Files of any length and size pass through in bounded memory. The metrics are of
the decoded frames, before they are compressed into an mp4. Browsers do not play
an mp4 whose height or width is odd.
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import tqdm
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax import convert, errors, files, memory, provenance, sharding
from dcvideogen_jax.data import stills
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.eval import comparison as comparison_lib
from dcvideogen_jax.models import bands, dc_ae_v, streaming
from dcvideogen_jax.programs import common, distributed
from dcvideogen_jax.sample import model_names

_MODEL = flags.DEFINE_string(
  "model",
  "tiny",
  'Weights: "tiny", a directory, the official .pt, or a .safetensors file.',
)
_CONFIG = flags.DEFINE_string("config", None, model_names.CONFIG_HELP)
_INPUT = flags.DEFINE_string(
  "input", None, "A video or an image.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "A directory.", required=True)
_MAX_FRAMES = flags.DEFINE_integer(
  "max_frames", None, "Take only the first frames.", lower_bound=1
)
_HEIGHT = flags.DEFINE_integer(
  "height", None, "Resize to so many rows first.", lower_bound=1
)
_WIDTH = flags.DEFINE_integer(
  "width",
  None,
  "Resize to so many columns first. With only one of --height and --width, the"
  " other follows.",
  lower_bound=1,
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of the computation."
)
_BUDGET = flags.DEFINE_float(
  "memory_budget_gib",
  None,
  "Memory beyond the weights; frames that do not fit are computed in bands,"
  " with the same result. Unset: four fifths of what is free.",
  lower_bound=1e-6,
)
_SPATIAL = flags.DEFINE_integer(
  "spatial",
  1,
  "Devices that share a picture's columns, and the memory it takes.",
  lower_bound=1,
)
_FRAMES_RULE = flags.DEFINE_enum(
  "frames_rule",
  "pad",
  ["pad", "official"],
  "What becomes of frames that do not fill a chunk: pad repeats the last one"
  " and cuts the surplus off; official treats them without causality, as the"
  " official code does silently, and needs a multiple of 4 frames.",
)
_CRF = flags.DEFINE_integer(
  "crf",
  18,
  "Quality of the mp4 files, 0 the best.",
  lower_bound=0,
  upper_bound=51,
)

_UNKNOWN_FPS = 16.0


class Input(NamedTuple):
  """What goes in, after resizing and `--max_frames`.

  Attributes:
    path: the file.
    height: pixels.
    width: pixels.
    frames: as the file says; only its end tells.
    fps: frames per second; None for an image.
  """

  path: str
  height: int
  width: int
  frames: int
  fps: float | None


def main(argv: Sequence[str]) -> None:
  """Checks, loads, streams, writes."""
  del argv
  distributed.join()
  clock = clock_lib.Clock()
  source = _probe(_INPUT.value)
  weights = model_names.weights(_MODEL.value)
  config = model_names.config(_CONFIG.value)
  mesh = _mesh()
  with common.output_directory(_OUTPUT.value) as output, jax.set_mesh(mesh):
    with clock.phase("load"):
      # None keeps the parameters as they are and computes in float32.
      dtype = None if _DTYPE.value == "float32" else jnp.dtype(_DTYPE.value)
      everywhere = NamedSharding(mesh, P())
      module, variables = convert.load(
        "dc_ae_v", weights, config, dtype, sharding=everywhere
      )
    if source.fps is not None and module.time == "non_causal":
      # It sees the whole clip at once, so what a container claims is not
      # enough.
      source = source._replace(frames=_count(source))
    _check_frames(source, source.frames, module)
    settings = _settings(module, variables)
    print(
      f"{weights}: {settings['variant']}, {settings['parameters']:,} parameters"
    )
    print(
      f"{source.path}: {source.frames} x {source.height} x {source.width}"
      " pixels; compiling for the first chunk",
      flush=True,
    )
    with files.atomic_files(output) as new:
      metrics = _reconstruct(module, variables, source, settings, new, clock)
      with files.atomic(new / "metrics.json") as path:
        path.write_text(provenance.to_json(metrics), encoding="utf-8")
      written = sorted(os.listdir(new))
  print(_summary(metrics))
  print(f"wrote {output}: {', '.join(written)}")


def _reconstruct(
  module: dc_ae_v.DCAEV,
  variables: streaming.Variables,
  source: Input,
  settings: dict[str, Any],
  directory: pathlib.Path,
  clock: clock_lib.Clock,
) -> dict[str, Any]:
  """Writes everything but the metrics, which it returns."""
  module = _for_clip(module, source)
  plans = _plans(module, source)
  plans_told = {name: dataclasses.asdict(plan) for name, plan in plans.items()}
  settings = {**settings, "plans": plans_told}
  comparison = comparison_lib.Comparison(
    directory,
    f"{pathlib.Path(source.path).name}, {_MODEL.value}",
    frames=source.frames,
    fps=source.fps,
    crf=_CRF.value,
    comment=json.dumps(settings),
  )
  with clock.phase("compare and write"), comparison:
    numbers = _stream(module, variables, source, plans, comparison, clock)
  return {
    "input": source._asdict(),
    **comparison.metrics(),
    "compression": numbers,
    "settings": settings,
    "seconds": clock.report(),
    "memory": {
      "peak_rss_bytes": memory.peak_rss(),
      "peak_device_bytes": memory.peak_device(),
    },
    "versions": provenance.versions(),
  }


def _mesh() -> Mesh:
  """The devices that share the pictures.

  Raises:
    errors.UserError: if there are not as many, or if processes would have none.
  """
  count, devices = _SPATIAL.value, jax.devices()
  if count > len(devices):
    raise errors.UserError(
      f"--spatial={count} needs as many devices, found {len(devices)}"
    )
  if jax.process_count() > 1 and count < len(devices):
    raise errors.UserError(
      f"{jax.process_count()} processes need --spatial={len(devices)}, all "
      f"their devices, found {count}"
    )
  return sharding.make_mesh({"spatial": count}, devices[:count])


def _probe(path: str) -> Input:
  """Looks at the input.

  Raises:
    errors.UserError: if it is missing, damaged or empty.
  """
  if video_files.is_image(path):
    height, width = stills.read(path).shape[:2]
    frames, fps = 1, None
  else:
    info = video_files.probe(path)
    height, width, frames = info.height, info.width, info.frames
    fps = info.fps or _UNKNOWN_FPS
  new_height, new_width = _HEIGHT.value, _WIDTH.value
  if new_height or new_width:
    new_height = new_height or max(1, round(height * new_width / width))
    new_width = new_width or max(1, round(width * new_height / height))
    height, width = new_height, new_width
  return Input(
    path, height, width, min(frames, _MAX_FRAMES.value or frames), fps
  )


def _count(source: Input) -> int:
  """Frames that are shown, by decoding them all."""
  shown = video_files.frames(source.path)
  return sum(1 for _ in itertools.islice(shown, _MAX_FRAMES.value))


def _frames(source: Input) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """The frames of the input, of its size."""
  size = (source.height, source.width)
  if source.fps is not None:
    yield from video_files.read_frames(
      source.path, max_frames=_MAX_FRAMES.value, size=size
    )
    return
  image = PIL.Image.fromarray(stills.read(source.path))
  if image.size != size[::-1]:
    image = image.resize(size[::-1], PIL.Image.Resampling.BICUBIC)
  yield np.asarray(image)


def _check_frames(source: Input, frames: int, module: dc_ae_v.DCAEV) -> None:
  """Raises UserError if the official rule does not take so many frames."""
  factor = module.temporal_factor
  if source.fps is None or _FRAMES_RULE.value == "pad" or frames % factor == 0:
    return
  raise errors.UserError(
    f"{source.path} gives {frames} frames, but --frames_rule=official needs a"
    f" multiple of {factor}: use --frames_rule=pad, or --max_frames="
    f"{frames // factor * factor or factor}"
  )


def _for_clip(module: dc_ae_v.DCAEV, source: Input) -> dc_ae_v.DCAEV:
  """The same function of this clip as a module that can be streamed.

  An image is a clip of `temporal_factor` equal frames with zeros before and
  after, as in the reference, and a non_causal model sees zeros around the whole
  clip: both are chunk_causal with a single chunk.
  """
  if source.fps is not None and module.time != "non_causal":
    return module
  factor = module.temporal_factor
  time = "causal" if module.time == "causal" else "chunk_causal"
  frames = -(-source.frames // factor) * factor
  return module.clone(chunk_frames=frames, time=time)


def _plans(module: dc_ae_v.DCAEV, source: Input) -> dict[str, bands.BandPlan]:
  """How chunks are computed within the memory budget.

  Raises:
    errors.UserError: if the budget is too small.
  """
  budget = 0.8 * memory.free_on_all()
  if _BUDGET.value is not None:
    budget = _BUDGET.value * 2**30
  streamed = source.frames > module.chunk_frames
  return {
    name: bands.plan(
      module,
      source.height,
      source.width,
      budget,
      decode=name == "decode",
      streamed=streamed,
      devices=_SPATIAL.value,
    )
    for name in ("encode", "decode")
  }


def _stream(
  module: dc_ae_v.DCAEV,
  variables: streaming.Variables,
  source: Input,
  plans: dict[str, bands.BandPlan],
  comparison: comparison_lib.Comparison,
  clock: clock_lib.Clock,
) -> dict[str, Any]:
  """Runs the frames through the model; returns what became of the numbers."""
  waiting: collections.deque[np.ndarray] = collections.deque()
  values = collections.Counter()

  def pieces():
    count = 0
    for frame in clock.over("read", _frames(source)):
      waiting.append(frame)
      count += 1
      yield frame[None, None]
    _check_frames(source, count, module)
    for _ in range(-count % module.temporal_factor):
      yield frame[None, None]
    values["input"] = count * frame.size

  def latents():
    encoded = streaming.encode(
      module, variables, pieces(), plan=plans["encode"], tail=_FRAMES_RULE.value
    )
    for latent in encoded:
      values["latent"] += latent.size
      values["latent_frames"] += latent.shape[1]
      yield jax.block_until_ready(latent)

  decoded = streaming.decode(
    module,
    variables,
    clock.over("encode", latents()),
    plan=plans["decode"],
    tail=_FRAMES_RULE.value,
    dtype=np.uint8,
  )
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
  assert not waiting
  return {
    **values,
    "ratio": values["input"] / values["latent"],
    "nominal_ratio": 3
    * module.spatial_factor**2
    * module.temporal_factor
    / module.latent_channels,
  }


def _settings(
  module: dc_ae_v.DCAEV, variables: streaming.Variables
) -> dict[str, Any]:
  """What determines the result."""
  leaves = jax.tree.leaves(variables)
  return {
    "model": _MODEL.value,
    "variant": model_names.variant("dc_ae_v", module),
    "parameters": sum(leaf.size for leaf in leaves),
    "parameter_dtypes": sorted({leaf.dtype.name for leaf in leaves}),
    "config": convert.config_of(module),
    "dtype": _DTYPE.value,
    "frames_rule": _FRAMES_RULE.value,
    "memory_budget_gib": _BUDGET.value,
    "spatial": _SPATIAL.value,
    "crf": _CRF.value,
  }


def _summary(metrics: dict[str, Any]) -> str:
  """The result in two lines."""
  psnr, ssim = metrics["psnr"]["mean"], metrics["ssim"]["mean"]
  phases = ", ".join(
    f"{name} {seconds:.1f}"
    for name, seconds in metrics["seconds"].items()
    if name != "total"
  )
  return (
    f"PSNR {'exact' if psnr is None else f'{psnr:.2f} dB'}, SSIM {ssim:.4f},"
    f" {metrics['compression']['ratio']:.0f} times fewer numbers,"
    f" {metrics['frames']} frames\n"
    f"{metrics['seconds']['total']:.1f} s ({phases}), peak memory"
    f" {metrics['memory']['peak_rss_bytes'] / 1e9:.2f} GB"
  )
