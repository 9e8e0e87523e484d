"""Measures generated videos: FVD, fidelity to an image, drift of the colours.

  dcvideogen evaluate generation --folder=out/videos \\
    --fvd_reference=UCF-101 --output=out/generation.json
  dcvideogen evaluate generation --config=dc-i2v-14b --prompts=pairs.jsonl \\
    --lpips=alex --output=out/i2v.json
  dcvideogen evaluate generation --model=tiny --world_prompts=200 \\
    --output=out/world.json

--folder takes videos that are there, such as the output of `dcvideogen sample`.
Without it the videos of --prompt, --prompts or --world_prompts are made first,
with the flags of `dcvideogen sample`, into the folder OUTPUT_videos, OUTPUT
without its suffix.

  FVD           against --fvd_reference
  first frame   PSNR, SSIM and with --lpips LPIPS against the image that the
                video starts from, where it does
  colour drift  of each frame against that image, or else the first frame, as
                the distance of the mean colours in CIELAB
  facts         with --world or --world_prompts: colour, shape and motion of the
                tiny captioned world, read from the pixels

Videos are read back from their files; --crf=0 makes them without loss.

These files are written, beside --output without its suffix:
  .json            all figures, by video and by frame, and all settings
  .md              a table
  .png             frames of the first videos
  .reference.npz   the statistics of --fvd_reference, which takes them too

The same command again goes on where it was: it makes the videos that are not
there, and measures those that are not in .clips.jsonl, which is removed at the
end. With --processes=N and --process=I it takes every Nth video, beside N - 1
other processes; the last one to finish writes the report.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import (
  common,
  evaluate_flags,
  metric_flags,
  sampling,
)
from dcvideogen_jax.sample import presets

_FOLDER = flags.DEFINE_string(
  "folder",
  None,
  "Folder of videos, with the folders below it. Unset: videos are made.",
)
_IMAGES = flags.DEFINE_string(
  "images",
  None,
  "Folder of the images that the videos of --folder start from, named as in"
  " their settings, or as the video. Unset: the paths in their settings.",
)
_REFERENCE = flags.DEFINE_string(
  "fvd_reference",
  None,
  "Clips that FVD compares with: a folder of videos, a text file with a path"
  " per line, a folder of `dcvideogen prepare-clips`, or an .npz file of their"
  " statistics. Unset: no FVD.",
)
_WINDOW = flags.DEFINE_integer(
  "fvd_window",
  None,
  "Frames of the windows that FVD compares, which do not overlap. Unset: whole"
  " videos, which then have one length.",
  lower_bound=9,
)
_WORLD = flags.DEFINE_boolean(
  "world",
  False,
  "Read colour, shape and motion from the first 16 frames of the videos, whose"
  " prompts are captions of the tiny captioned world.",
)
_WORLD_PROMPTS = flags.DEFINE_integer(
  "world_prompts",
  None,
  "Make and read videos of this number of held-out scenes of the tiny captioned"
  " world. Image to video gets a rendered first frame.",
  lower_bound=1,
)

PRESETS = presets
_OF_SAMPLING = (
  *("model", "task", "autoencoder", "image_encoder", "lora", "prompt"),
  *("prompts", "image", "frames", "seeds", "text_encoder", "crf"),
  *("memory_budget_gib", "world_prompts", "few"),
)


def main(argv: Sequence[str]) -> None:
  """Makes the videos that are missing, measures them and writes the figures.

  Raises:
    errors.UserError: if there are no videos, or the flags do not fit.
  """
  del argv
  _check_flags()
  share = metric_flags.share()
  with evaluate_flags.report() as report:
    from dcvideogen_jax.eval import generation_runs

    if _FOLDER.value is not None:
      videos = generation_runs.listed(_FOLDER.value, _IMAGES.value)
      _check_count(videos, share[1])
      made: dict[str, Any] = {"set": _FOLDER.value}
      sizes = _sizes(videos)
    else:
      videos, made = _make(share[1])
      sizes = _sizes(videos[share[0] :: share[1]])
    read = _reader(videos)
    reference, stored = _reference(sizes)
    networks, told = metric_flags.networks(_REFERENCE.value is not None)
    if "FVD" in told:
      kind = "whole videos"
      if _WINDOW.value is not None:
        kind = f"windows of {_WINDOW.value} frames"
      told["FVD"] += f", {kind}, against {_REFERENCE.value}"
    settings = {
      "videos": [(x.name, x.prompt, x.image) for x in videos],
      "made": made,
      "networks": told,
      "window": _WINDOW.value,
      "reference": reference and [*reference.names],
      "world": read is not None,
    }
    record = metric_flags.record(settings)
    if reference is not None:
      generation_runs.measure_reference(
        reference, record, networks.i3d, _WINDOW.value
      )
    generation_runs.measure(
      videos, record, networks, _WINDOW.value, _image, read
    )
    record.look()
    if not generation_runs.has_all(videos, reference, record):
      print("measured; the last of the processes to finish writes the report")
      return
    if reference is not None:
      stored = generation_runs.moments(reference.names, videos, record)
      stored.save(_beside(".reference.npz"))
    found = generation_runs.summary(videos, record, stored)
    shapes = [x["shape"] for x in found["by_video"]]
    _write(report, found, made, told, shapes)
  record.remove()


def _check_flags() -> None:
  if _FOLDER.value is not None:
    common.refuse_flags(_OF_SAMPLING, "does not go with --folder")
  else:
    common.refuse_flags(["images", "world"], "goes with --folder only")
  if _WORLD_PROMPTS.value is not None:
    common.refuse_flags(
      ["prompt", "prompts", "image"], "does not go with --world_prompts"
    )
  if _REFERENCE.value is None:
    common.refuse_flags(["fvd_window"], "goes with --fvd_reference only")
  metric_flags.refuse(_REFERENCE.value is not None, "--fvd_reference")


def _check_count(videos: Sequence[Any], processes: int) -> None:
  """Raises UserError if a process would have no video."""
  if len(videos) < processes:
    raise errors.UserError(
      f"{len(videos)} videos are too few for --processes={processes}"
    )


def _make(processes: int) -> tuple[list[Any], dict[str, Any]]:
  """Makes this process's videos; returns all, and what they are made with."""
  from dcvideogen_jax.eval import generation_runs
  from dcvideogen_jax.programs import prompt_export
  from dcvideogen_jax.sample import request_list, vbench

  folder = pathlib.Path(evaluate_flags.OUTPUT.value).with_suffix("")
  folder = folder.with_name(f"{folder.name}_videos")
  export = functools.partial(
    prompt_export.Export, folder=folder, scenes=_WORLD_PROMPTS.value
  )
  job = sampling.Job(export=export)
  _check_count(job.listed, processes)

  def make(pipeline, request, options):
    return pipeline.generate(
      request.prompt,
      last_image=request_list.read_image(request.last_image),
      size_rule=job.c.size_rule,
      condition_tail=job.c.condition_tail,
      one_program=True,
      phase=job.clock.phase,
      **options,
    )

  job.run(make, str(folder), texts=lambda prompt: [prompt], told={}, whole=True)
  videos = [
    generation_runs.Video(
      folder / vbench.VIDEOS / f"{x.name()}.mp4", x.prompt, x.image
    )
    for x in job.listed
  ]
  return videos, {"set": str(folder), **job.made_with()}


def _sizes(videos: Sequence[Any]) -> list[tuple[int, int, int]]:
  """Returns frames, height and width of videos, by their headers.

  Raises:
    errors.UserError: if they differ in length and FVD is of whole videos.
  """
  from dcvideogen_jax.data import video as video_files

  probed = [video_files.probe(x.path) for x in videos]
  lengths = sorted({info.frames for info in probed})
  if _REFERENCE.value is not None and not _WINDOW.value and lengths[1:]:
    raise errors.UserError(
      "FVD of whole videos compares videos of one length, found "
      f"{lengths[0]} and {lengths[-1]} frames: give --fvd_window"
    )
  return [(info.frames, info.height, info.width) for info in probed]


def _reference(sizes: Sequence[tuple[int, int, int]]) -> tuple[Any, Any]:
  """Returns the clips that FVD compares with, or else their statistics."""
  from dcvideogen_jax.data import records
  from dcvideogen_jax.eval import fvd, generation_runs, official_clips

  if _REFERENCE.value is None:
    return None, None
  given = pathlib.Path(_REFERENCE.value)
  if given.suffix == ".npz":
    return None, fvd.reference(given)
  frames, height, width = max(sizes)
  if [*given.glob(f"*{records.SUFFIX}")]:
    source = records.ClipSource(given)

    def clip(i):
      video = source[i]["video"]
      if len(video) < frames and not _WINDOW.value:
        raise _short(f"clip {i} of {given}", len(video), frames)
      count = min(len(video), frames)
      return video[official_clips.centre(len(video), count)]

    names = [f"{given}/{i}" for i in range(len(source))]
    return generation_runs.Reference(names, clip), None
  paths = official_clips.listed(given)

  def read(i):
    from dcvideogen_jax.data import video as video_files

    found = video_files.probe(paths[i]).frames
    if found < frames and not _WINDOW.value:
      raise _short(str(paths[i]), found, frames)
    return official_clips.read(paths[i], min(found, frames), height, width)

  return generation_runs.Reference([str(x) for x in paths], read), None


def _short(what: str, found: int, frames: int) -> errors.UserError:
  return errors.UserError(
    f"{what} has {found} frames, fewer than the {frames} of the videos: leave"
    " it out, or give --fvd_window"
  )


def _image(path: str, height: int, width: int) -> Any:
  """Returns an image in the size of a video, as the model got it."""
  from dcvideogen_jax.latents import conditions
  from dcvideogen_jax.sample import request_list

  return conditions.resize(request_list.read_image(path), height, width)


def _reader(videos: Sequence[Any]) -> Any:
  """Returns the function that reads the facts of the captioned world."""
  if not _WORLD.value and _WORLD_PROMPTS.value is None:
    return None
  from dcvideogen_jax.tiny import scorer, world

  for video in videos:
    if video.prompt is None or world.scene_of(video.prompt) is None:
      raise errors.UserError(
        "--world needs prompts that are captions of the world, and"
        f" {video.path} has {video.prompt and repr(video.prompt[:80])}"
      )

  def read(video, frames):
    reading = scorer.read(frames)
    right = scorer.right(reading, world.scene_of(video.prompt))
    shares = dict(zip(scorer.Reading._fields, right, strict=True))
    return {"read": reading._asdict(), "right": shares | {"all": all(right)}}

  return read


def _beside(suffix: str) -> pathlib.Path:
  return pathlib.Path(evaluate_flags.OUTPUT.value).with_suffix(suffix)


def _write(
  report: dict[str, Any],
  found: Mapping[str, Any],
  made: Mapping[str, Any],
  told: Mapping[str, str],
  shapes: Sequence[Sequence[int]],
) -> None:
  """Prints the table, writes it and a picture, and fills the report."""
  import numpy as np
  import PIL.Image

  from dcvideogen_jax import provenance
  from dcvideogen_jax.data import video as video_files
  from dcvideogen_jax.eval import (
    contact_sheet,
    generation_runs,
    reconstruction_runs,
  )

  sizes = reconstruction_runs.sizes(shapes)
  sizes["videos"] = sizes.pop("clips")
  about = {"set": made["set"], **sizes, **told}
  table = generation_runs.markdown(about, found)
  print(table, end="")
  with files.atomic(_beside(".md")) as path:
    path.write_text(table, encoding="utf-8")
  same = [x for x in found["by_video"] if x["shape"] == shapes[0]][:16]
  shown = np.stack(
    [np.stack([*video_files.read_frames(x["video"])]) for x in same]
  )
  with files.atomic(_beside(".png")) as path:
    PIL.Image.fromarray(contact_sheet.strips(shown)).save(path)
  report |= {**found, "about": about, "made": {**made}}
  report |= {"versions": provenance.versions()}
