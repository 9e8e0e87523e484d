"""Measures autoencoders on held-out clips.

  dcvideogen prepare-clips --split=heldout --output=out/heldout
  dcvideogen evaluate reconstruction --model=tiny \\
    --clips=out/heldout/frames16 --output=out/reconstruction.json
  dcvideogen evaluate reconstruction --model=f32t4c32 \\
    --wan_vae=Wan2.1_VAE.pth --videos=UCF-101 --output=out/ucf.json

Prints PSNR and SSIM of each autoencoder, averaged over the frames of all clips,
by the official definitions (uint8 frames, range 255; frames that are exact are
left out of the mean of PSNR and counted), and MS-SSIM where all sides have the
176 pixels that it needs. --videos and --tfds read clips as the official
evaluation does: the centre frames at the video's own frame rate, halved by
averaging, resized bicubically, the centre cut out.

--lpips=alex or vgg adds LPIPS. --fvd adds FVD between the originals and their
reconstructions, of whole clips and of windows of 16 frames. Their networks are
given as files, or fetched once, which is said; without --lpips and --fvd
nothing is fetched.

--streamed reads, encodes, decodes and measures each clip piece by piece, so
that it may be longer than memory.

These files are written, beside --output without its suffix:
  .json         all figures, by clip and by frame, and all settings
  .md           a table
  .png          the worst and the best clips of the first autoencoder
  .curves.png   the metrics against the number of the frame

A run that was stopped goes on where it was: a clip that is measured is a line
in .clips.jsonl, which is removed at the end. With --processes=N and --process=I
it measures every Nth clip, beside N - 1 other processes; the last one to finish
writes the report.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import common, evaluate_flags, metric_flags

_MODEL = flags.DEFINE_multi_string(
  "model",
  ["tiny"],
  "Weights of an autoencoder: tiny, which ships, a directory, or a .pt or"
  " .safetensors file, optionally with another decoder, as in"
  " tiny,decoder=fast. Several are measured on the same clips.",
)
_WAN_VAE = flags.DEFINE_multi_string(
  "wan_vae",
  [],
  "Weights of Wan's autoencoder, measured beside --model, or alone without it."
  " It takes 1 + 4k frames: the last frame is repeated until they are as many,"
  " and the copies are not measured.",
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
_TFDS = flags.DEFINE_string(
  "tfds",
  None,
  "Name of a TFDS data set in the ArrayRecord format, whose videos are read as"
  " those of --videos.",
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir",
  None,
  "Directory of TFDS data sets, for --tfds. Unset: TFDS's default.",
)
_SPLIT = flags.DEFINE_string("split", "test", "Split of the --tfds data set.")
_FRAMES = flags.DEFINE_integer(
  "frames",
  None,
  "Frames of the clips of --videos and --tfds, from the centre; a shorter video"
  " repeats its first and last frames. Unset: 80. Of --clips the first frames."
  " Unset: all.",
  lower_bound=1,
)
_FIRST = flags.DEFINE_boolean(
  "first",
  False,
  "Take the first --frames frames of --videos and --tfds instead of those in"
  " the centre, as the official evaluation of long videos.",
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
_FVD = flags.DEFINE_boolean(
  "fvd",
  False,
  "Measure FVD, which takes two clips or more, of at least 9 frames each.",
)
_FVD_WINDOWS = flags.DEFINE_boolean(
  "fvd_windows",
  True,
  "Measure FVD of windows of 16 frames too, beside whole clips.",
)
_KEEP = flags.DEFINE_boolean(
  "keep",
  False,
  "Keep .clips.jsonl, so that the same command with a further --model measures"
  " that one only.",
)
_STREAMED = flags.DEFINE_boolean(
  "streamed",
  False,
  "Hold a few frames of a clip at a time, for causal and chunk-causal"
  " autoencoders and Wan's. FVD is of windows only then.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "dtype of the computation."
)


def main(argv: Sequence[str]) -> None:
  """Reconstructs the clips; prints and writes the averages.

  Raises:
    errors.UserError: if there are no clips, or the flags do not fit.
  """
  del argv
  _check_flags()
  with evaluate_flags.report() as report:
    from dcvideogen_jax.eval import reconstruction_runs

    labels = _labels()
    for label in labels:
      _parsed(label)  # Says now which of them does not exist.
    clips = _clips()
    settings = {
      "about": dict(clips.about),
      "names": [*clips.names],
      "config": _CONFIG.value,
      "dtype": _DTYPE.value,
      "ground_truth": _GROUND_TRUTH.value,
      "streamed": _STREAMED.value,
      "windows": _FVD_WINDOWS.value,
    }
    networks, told = metric_flags.networks(_FVD.value)
    if told:
      settings["networks"] = told
    record = metric_flags.record(settings)
    configs = {}
    for label in labels:
      configs[label] = _measure(label, clips, record, networks)
    record.look()
    if not all(record.has_all(label, clips.names) for label in labels):
      print("measured; the last of the processes to finish writes the report")
      return
    models = {}
    for label in labels:
      found = reconstruction_runs.summary(label, clips, record)
      models[label] = found | {"config": configs[label]}
      _print(label, found)
    shapes = [record.rows[labels[0], name]["shape"] for name in clips.names]
    about = {
      "set": clips.about["set"],
      **reconstruction_runs.sizes(shapes),
      **clips.about,
      **told,
      "dtype": _DTYPE.value,
      "ground truth": _GROUND_TRUTH.value,
    }
    _write(about, models, clips, record)
    report |= {"model": labels[0], **models[labels[0]]}
    report |= {"about": about, "models": models}
  if not _KEEP.value:
    record.remove()


def _check_flags() -> None:
  sources = {"clips": _CLIPS, "videos": _VIDEOS, "tfds": _TFDS}
  given = [name for name, flag in sources.items() if flag.value is not None]
  if len(given) != 1:
    raise errors.UserError(
      "expected one of --clips, --videos and --tfds, found "
      + (" and ".join(f"--{name}" for name in given) or "none")
    )
  if _CLIPS.value is not None:
    common.refuse_flags(["size", "first"], "goes with --videos and --tfds only")
  if _TFDS.value is None:
    common.refuse_flags(["data_dir", "split"], "goes with --tfds only")
  if len(_labels()) > 1:
    common.refuse_flags(["config"], "goes with a single --model only")
  metric_flags.refuse(_FVD.value, "--fvd")
  metric_flags.share()
  if not _FVD.value or _STREAMED.value:
    common.refuse_flags(
      ["fvd_windows"], "goes with --fvd and without --streamed only"
    )


def _labels() -> list[str]:
  """Returns the names of the autoencoders, in the order of the table."""
  models = _MODEL.value
  if _WAN_VAE.value and not flags.FLAGS["model"].present:
    models = []
  return [*dict.fromkeys((*models, *_WAN_VAE.value))]


def _clips() -> Any:
  """Returns the clips of the flags."""
  from dcvideogen_jax.data import clip_sources, records
  from dcvideogen_jax.eval import official_clips, reconstruction_runs

  if _CLIPS.value is not None:
    source = records.ClipSource(_CLIPS.value)
    about = {"set": _CLIPS.value, "clips": len(source)}
    if first := _FRAMES.value:
      about["frames"] = f"the first {first}"
    return reconstruction_runs.Clips(
      [str(i) for i in range(len(source))],
      lambda i: source[i]["video"][:first],
      about,
    )
  frames, size = _FRAMES.value or 80, _SIZE.value
  shape = frames, size, size, _FIRST.value
  place = f"the first {frames}" if _FIRST.value else f"{frames} in the centre"
  if _TFDS.value is not None:
    data = clip_sources.TensorFlowDataset(
      _TFDS.value, _DATA_DIR.value, _SPLIT.value, None
    )
    names, name = [str(i) for i in range(len(data))], data.name

    def pieces(i):
      with data.file(i) as path:
        yield from official_clips.pieces(path, *shape)
  else:
    paths = official_clips.listed(_VIDEOS.value)
    names, name = [str(path) for path in paths], _VIDEOS.value

    def pieces(i):
      return official_clips.pieces(paths[i], *shape)

  return reconstruction_runs.Clips(
    names,
    lambda i: official_clips.joined(pieces(i)),
    {
      "set": name,
      "clips": len(names),
      "frames": f"{place}, at the video's own rate",
      "size": f"{size} x {size}, official crop",
    },
    pieces,
  )


def _measure(label: str, clips: Any, record: Any, networks: Any) -> Any:
  """Measures the clips that are left; returns the configuration."""
  from dcvideogen_jax import convert
  from dcvideogen_jax.eval import autoencoders, reconstruction_runs

  loaded = _load(label)
  arguments = clips, record, _GROUND_TRUTH.value, networks
  if _STREAMED.value:
    run = autoencoders.in_pieces(*loaded)
    reconstruction_runs.measure_in_pieces(label, run, *arguments)
  else:
    whole = autoencoders.whole(*loaded)
    reconstruction_runs.measure(
      label, whole, *arguments, windows=_FVD_WINDOWS.value
    )
  return convert.config_of(loaded[0])


def _write(about: Any, models: Any, clips: Any, record: Any) -> None:
  """Writes the table, the curves and the picture."""
  from dcvideogen_jax.eval import autoencoders, curves, reconstruction_runs

  output = pathlib.Path(evaluate_flags.OUTPUT.value)
  with files.atomic(output.with_suffix(".md")) as path:
    table = reconstruction_runs.markdown(about, models)
    path.write_text(table, encoding="utf-8")
  title = ", ".join(
    f"{key} {about[key]}" for key in ("set", "clips", "frames", "size")
  )
  try:
    curves.plot(output.with_suffix(".curves.png"), title, models)
  except errors.UserError as e:
    print(e)
  if _STREAMED.value:
    return  # The picture needs whole clips.
  label = next(iter(models))
  whole = autoencoders.whole(*_load(label))
  reconstruction_runs.picture(
    output.with_suffix(".png"), label, whole, clips, record
  )


def _parsed(label: str) -> tuple[pathlib.Path, str | None]:
  """Returns the path of an autoencoder, and the decoder that it is given."""
  from dcvideogen_jax.sample import decoders, model_names

  name, _, decoder = label.partition(",decoder=")
  path = model_names.weights(name)
  if decoder:
    decoders.find(path, decoder)
  return path, decoder or None


def _load(label: str) -> tuple[Any, Any, str, Any]:
  """Returns the arguments of `autoencoders.whole`."""
  import jax.numpy as jnp

  from dcvideogen_jax import convert
  from dcvideogen_jax.sample import decoders, model_names

  path, decoder = _parsed(label)
  config = model_names.config(_CONFIG.value)
  dtype = None if _DTYPE.value == "float32" else jnp.dtype(_DTYPE.value)
  if label in _WAN_VAE.value:
    module, variables = convert.load("wan_vae", path, config, dtype)
    return module, variables, _GROUND_TRUTH.value, None
  pair = decoders.load(path, decoder, config, dtype)
  return pair.module, pair.variables, _GROUND_TRUTH.value, pair.decoder


def _print(label: str, found: Any) -> None:
  """Prints the averages of an autoencoder."""
  from dcvideogen_jax.eval import reconstruction_runs

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
