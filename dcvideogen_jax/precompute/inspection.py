"""Reports which clips a source holds and how much encoding would write."""

import collections
import concurrent.futures
import functools
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from dcvideogen_jax import convert, documents, errors
from dcvideogen_jax.data import buckets, latents, timing, tokenize
from dcvideogen_jax.precompute import encoders as encoders_lib
from dcvideogen_jax.precompute import encoding
from dcvideogen_jax.sample import layouts

# The variant of each encoder where no config.json names one: the encoders of
# DC-VideoGen with Wan 2.1.
_RELEASED = {
  "dc_ae_v": "f32t4c32",
  "wan_vae": "wan2.1",
  "text_encoder": "umt5_xxl",
  "image_encoder": "vit_h_14",
}
_NO_CAPTION = "no caption"
_TOKEN = 4  # Characters of a token, roughly.
_LISTED = 20  # Most clips that one list of the report names.
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Clip(NamedTuple):
  """The captions and the place of a clip, or the reason to leave it out."""

  file: str
  captions: tuple[str, ...]
  size: buckets.Size | None
  seconds: float | None
  fps: float
  reason: str | None


def report(job: encoding.Job, numbers: Sequence[int]) -> tuple[str, bool]:
  """Probes clips and reports on them, without decoding or encoding the clips.

  Args:
    job: what would be encoded. Its output folder is not used.
    numbers: numbers of the clips.

  Returns:
    The report as text, and whether any clip can be used.

  Raises:
    errors.UserError: if a config.json of an encoder, or the tokenizer, cannot
      be read.
  """
  encoders = _modules(job.paths, job.options.i2v)
  deep = encoders.get("dc_ae_v")
  factor = encoders_lib.FACTOR if deep is None else deep.spatial_factor
  look = functools.partial(
    _look, job, buckets.find(job.bucket, factor), "text_encoder" in encoders
  )
  threads = job.threads or encoding.reading_threads()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    clips = pool.map(look, numbers)
    clips = [*tqdm.tqdm(clips, total=len(numbers), unit="clip", disable=None)]
  usable = [x for x in clips if x.reason is None]
  lines = [f"{len(usable)} of {len(clips)} clips can be used"]
  counts = collections.Counter(x.size for x in usable)
  lines += [f"  {str(x):>9}  {count}" for x, count in sorted(counts.items())]
  seconds = [x.seconds for x in usable if x.seconds is not None]
  if seconds:
    lines.append(
      f"durations: {min(seconds):.1f} to {max(seconds):.1f} s, median "
      f"{statistics.median(seconds):.1f} s, {sum(seconds) / 3600:.2f} h in all"
    )
  total = sum(_bytes(x, encoders, job) for x in usable)
  unit = next((u for u in _UNITS if total >= u[1]), _UNITS[-1])
  lines.append(f"about {total / unit[1]:.3g} {unit[0]} would be written")
  if cut := _cut(usable, job):
    lines.append(
      f"{cut} captions would be cut to their first {job.options.text_tokens} "
      "tokens"
    )
  fps = job.source.about().get("fps")  # None keeps the frame rate of a file.
  lines += _listed(
    f"{x.file}: {x.fps:.4g} frames per second, some are repeated"
    for x in usable
    if timing.repeats(x.fps, fps)
  )
  reasons = [x.reason for x in clips if x.reason is not None]
  if reasons:
    silent = reasons.count(_NO_CAPTION)
    lines.append(
      f"left out: {silent} without a caption, {len(reasons) - silent} missing, "
      "damaged or too short"
    )
  lines += _listed(f"{x.file}: {x.reason}" for x in clips if x.reason)
  return "\n".join(lines), bool(usable)


def _listed(lines: Iterable[str]) -> list[str]:
  lines = [f"  {line}" for line in lines]
  more = len(lines) - _LISTED
  return lines[:_LISTED] + ([f"  and {more} more"] if more > 0 else [])


def _look(
  job: encoding.Job, sizes: Sequence[buckets.Size], texts: bool, number: int
) -> Clip:
  file, captions = str(number), ()
  try:
    file, captions, _ = job.source[number]
    if texts and not captions:
      raise errors.UserError(_NO_CAPTION)
    place = job.source.place(number, job.options.frames, sizes)
  except errors.UserError as e:
    return Clip(file, captions, None, None, 0.0, str(e))
  return Clip(file, captions, *place, None)


def _modules(paths: layouts.Paths, i2v: bool) -> dict[str, Any]:
  """Returns the encoders without their weights, by part.

  A module is built from the config.json beside its weights, or else as the
  released variant. Without any paths, all encoders of the task are returned.
  """
  given = [part for part in _RELEASED if getattr(paths, part) is not None]
  wanted = given or [p for p in _RELEASED if i2v or p != "image_encoder"]
  return {part: _module(part, getattr(paths, part)) for part in wanted}


def _module(part: str, path: pathlib.Path | None) -> Any:
  kind = convert.KINDS[encoders_lib.KINDS[part]]
  config = path and (path if path.is_dir() else path.parent) / "config.json"
  fields = kind.variants[_RELEASED[part]]
  if config is not None and config.is_file():
    try:
      found = documents.parse(config.read_bytes())
      own = {k: v for k, v in found.items() if k != "kind"}
      theirs = None if "kind" in found else kind.config_from(found)
      return kind.build(theirs or own)
    except (OSError, ValueError, TypeError, AttributeError) as e:
      raise errors.UserError(f"cannot make out {config}: {e}") from e
  return kind.build(fields)


def _bytes(clip: Clip, encoders: dict[str, Any], job: encoding.Job) -> int:
  """Returns the bytes of an encoded clip before compression.

  The number of text tokens is a guess from the length of the captions.
  """
  numbers, i2v = 0, job.options.i2v
  for part in ("dc_ae_v", "wan_vae"):
    if part in encoders:
      m = encoders[part]
      places = -(-clip.size.height // m.spatial_factor)
      places *= -(-clip.size.width // m.spatial_factor)
      values = places * (job.options.frames // 4) * m.latent_channels
      numbers += 2 * values if i2v else values
  if i2v and "image_encoder" in encoders:
    m = encoders["image_encoder"]
    numbers += (1 + (m.image_size // m.patch) ** 2) * m.width
  if "text_encoder" in encoders:
    most = job.options.text_tokens
    tokens = sum(min(most, 1 + len(x) // _TOKEN) for x in clip.captions)
    numbers += tokens * encoders["text_encoder"].width
  return numbers * np.dtype(latents.DTYPES[job.dtype]).itemsize


def _cut(usable: Sequence[Clip], job: encoding.Job) -> int:
  """Returns how many captions would be cut; 0 without a tokenizer."""
  if job.paths.tokenizer is None:
    return 0
  tokenizer = tokenize.Tokenizer.from_directory(job.paths.tokenizer)
  counts = tokenizer.count([text for x in usable for text in x.captions])
  return int((counts > job.options.text_tokens).sum())
