"""Encodes and decodes a video or an image, and measures the reconstruction.

  dcvideogen reconstruct --model=tiny --input=demo --output=out
  dcvideogen reconstruct --model=f32t4c32 --input=clip.mp4 --output=out \\
    --dtype=bfloat16 --memory_budget_gib=16

With --spatial=N each picture is shared by N devices, which may belong to
several processes; start those like the processes of `dcvideogen train`. The
result is the same as on one device.

These files are written into `--output`, all together at the end:
  reconstruction.mp4   with the input's size, length and frame rate (.png for an
                       image)
  side_by_side.mp4     with the input on the left (.png for an image)
  contact_sheet.png    frames, reconstructions and error maps
  metrics.json         PSNR and SSIM per frame, settings, time, memory, versions

Inputs of any length and size are processed in bounded memory. The metrics
compare the decoded frames before they are compressed into an mp4. Browsers do
not play an mp4 whose height or width is odd.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import common, distributed

_MODEL = flags.DEFINE_string(
  "model",
  "tiny",
  "Weights of DC-AE-V: tiny, which ships, a directory, the official .pt, or a"
  " .safetensors, .pth, .bin or .ckpt file.",
)
_CONFIG = flags.DEFINE_string("config", None, common.CONFIG_HELP)
_DECODER = flags.DEFINE_string("decoder", None, common.DECODER_HELP)
_INPUT = flags.DEFINE_string(
  "input",
  None,
  "Video or image to reconstruct; demo is a clip that ships.",
  required=True,
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory to write the results to.", required=True
)
_MAX_FRAMES = flags.DEFINE_integer(
  "max_frames",
  None,
  "Maximum number of frames to read from the start. Unset: all frames.",
  lower_bound=1,
)
_HEIGHT = flags.DEFINE_integer(
  "height",
  None,
  "Height in pixels to resize the input to. With only one of --height and"
  " --width the aspect ratio is kept; with neither the input keeps its size.",
  lower_bound=1,
)
_WIDTH = flags.DEFINE_integer(
  "width",
  None,
  "Width in pixels to resize the input to; see --height.",
  lower_bound=1,
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "dtype of the computation."
)
_BUDGET = flags.DEFINE_float(
  "memory_budget_gib",
  None,
  "Memory for encoding and decoding, beyond the weights, in GiB. Frames that do"
  " not fit are computed in horizontal bands, with the same result. Unset: 85 %"
  " of the free memory.",
  lower_bound=1e-6,
)
_SPATIAL = flags.DEFINE_integer(
  "spatial",
  1,
  "Number of devices that share the columns of each picture, and so the memory"
  " it takes.",
  lower_bound=1,
)
_FRAMES_RULE = flags.DEFINE_enum(
  "frames_rule",
  "pad",
  ["pad", "official"],
  "Treatment of the last frames if they do not fill a chunk: pad repeats the"
  " last frame and cuts the surplus off again; official processes them without"
  " causality, as the official code does silently, and needs a multiple of 4"
  " frames.",
)
_CRF = flags.DEFINE_integer(
  "crf",
  18,
  "Constant rate factor of the mp4 files, from 0 (best quality, largest files)"
  " to 51.",
  lower_bound=0,
  upper_bound=51,
)


def main(argv: Sequence[str]) -> None:
  """Reconstructs --input chunk by chunk and writes the results.

  Raises:
    errors.UserError: if several processes have joined, but --spatial does not
      cover all their devices.
  """
  del argv
  distributed.join()
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from dcvideogen_jax import clock as clock_lib
  from dcvideogen_jax import files, sharding
  from dcvideogen_jax.eval import reconstruction
  from dcvideogen_jax.sample import decoders, model_names

  clock = clock_lib.Clock()
  source = reconstruction.probe(
    model_names.video(_INPUT.value),
    _MAX_FRAMES.value,
    _HEIGHT.value,
    _WIDTH.value,
  )
  weights = model_names.weights(_MODEL.value)
  config = model_names.config(_CONFIG.value)
  spatial, devices = _SPATIAL.value, jax.devices()
  if jax.process_count() > 1 and spatial < len(devices):
    raise errors.UserError(
      f"{jax.process_count()} processes need --spatial={len(devices)}, all "
      f"their devices, found {spatial}"
    )
  mesh = sharding.make_mesh({"spatial": spatial}, devices[:spatial])
  with common.output_directory(_OUTPUT.value) as output, jax.set_mesh(mesh):
    with clock.phase("load"):
      # None keeps the parameters as stored and computes in float32.
      dtype = None if _DTYPE.value == "float32" else jnp.dtype(_DTYPE.value)
      everywhere = NamedSharding(mesh, PartitionSpec())
      module, decoder, variables = decoders.load(
        weights, _DECODER.value, config, dtype, everywhere
      )
    source = reconstruction.checked(source, module, _FRAMES_RULE.value)
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
      metrics = reconstruction.write(
        new,
        module,
        variables,
        source,
        title=f"{pathlib.Path(source.path).name}, {_MODEL.value}",
        settings=settings,
        clock=clock,
        rule=_FRAMES_RULE.value,
        crf=_CRF.value,
        budget=_BUDGET.value and _BUDGET.value * 2**30,
        devices=spatial,
        decoder=decoder,
      )
      written = sorted(os.listdir(new))
  print(_summary(metrics))
  print(f"wrote {output}: {', '.join(written)}")


def _settings(module: Any, variables: Any) -> dict[str, Any]:
  """Returns the settings that determine the result."""
  import jax

  from dcvideogen_jax import convert
  from dcvideogen_jax.sample import model_names

  leaves = jax.tree.leaves(variables)
  return {
    "model": _MODEL.value,
    "variant": model_names.variant("dc_ae_v", module),
    "parameters": sum(leaf.size for leaf in leaves),
    "parameter_dtypes": sorted({leaf.dtype.name for leaf in leaves}),
    "config": convert.config_of(module),
    "decoder": _DECODER.value,
    "dtype": _DTYPE.value,
    "frames_rule": _FRAMES_RULE.value,
    "memory_budget_gib": _BUDGET.value,
    "spatial": _SPATIAL.value,
    "crf": _CRF.value,
  }


def _summary(metrics: dict[str, Any]) -> str:
  """Returns the metrics in two lines of text."""
  from dcvideogen_jax import clock

  psnr, ssim = metrics["psnr"]["mean"], metrics["ssim"]["mean"]
  return (
    f"PSNR {'exact' if psnr is None else f'{psnr:.2f} dB'}, SSIM {ssim:.4f},"
    f" {metrics['compression']['ratio']:.0f} times fewer numbers,"
    f" {metrics['frames']} frames\n{clock.told(metrics['seconds'])}, peak"
    f" memory {metrics['memory']['peak_rss_bytes'] / 1e9:.2f} GB"
  )
