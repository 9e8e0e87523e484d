"""What `launch.precompute --dry_run` tells of a source of clips."""

import collections
import concurrent.futures
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from dcvideogen_jax import convert, documents, errors
from dcvideogen_jax.data import buckets, latents, timing, tokenize
from dcvideogen_jax.precompute import encoders as encoders_lib
from dcvideogen_jax.sample import layouts

# What the encoders are if nobody says: those of DC-VideoGen from Wan 2.1.
_RELEASED = {
  "dc_ae_v": "f32t4c32",
  "wan_vae": "wan2.1",
  "text_encoder": "umt5_xxl",
  "image_encoder": "vit_h_14",
}
_NO_CAPTION = "no caption"
# Characters of a token, roughly.
_TOKEN = 4
_LISTED = 20
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Found(NamedTuple):
  """What is known of one clip: its place, or why it cannot be used."""

  file: str
  captions: tuple[str, ...]
  size: buckets.Size | None
  seconds: float | None
  fps: float
  reason: str | None


def modules(paths: layouts.Paths, i2v: bool) -> dict[str, Any]:
  """The encoders without their weights, by part: as config.json says.

  All that are needed if there are no paths. Where no config.json says more, an
  encoder is taken to be the released one.
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


def inspect(
  source: Any,
  numbers: Sequence[int],
  frames: int,
  sizes: Sequence[buckets.Size],
  texts: bool,
  threads: int,
) -> list[Found]:
  """Looks at clips, without decoding them."""

  def look(number: int) -> Found:
    file, captions = str(number), ()
    try:
      file, captions, _ = source[number]
      if texts and not captions:
        raise errors.UserError(_NO_CAPTION)
      place = source.place(number, frames, sizes)
    except errors.UserError as e:
      return Found(file, captions, None, None, 0.0, str(e))
    return Found(file, captions, *place, None)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    looked = tqdm.tqdm(
      pool.map(look, numbers), total=len(numbers), unit="clip", disable=None
    )
    return list(looked)


def clip_bytes(
  encoders: dict[str, Any],
  size: buckets.Size,
  frames: int,
  captions: Sequence[str],
  i2v: bool,
  dtype: str,
) -> int:
  """What a clip takes on disk, but for compression; texts are guessed."""
  numbers = 0
  for part in ("dc_ae_v", "wan_vae"):
    if part in encoders:
      m = encoders[part]
      places = -(-size.height // m.spatial_factor)
      places *= -(-size.width // m.spatial_factor)
      values = places * (frames // 4) * m.latent_channels
      numbers += 2 * values if i2v else values
  if i2v and "image_encoder" in encoders:
    m = encoders["image_encoder"]
    numbers += (1 + (m.image_size // m.patch) ** 2) * m.width
  if "text_encoder" in encoders:
    tokens = sum(min(512, 1 + len(x) // _TOKEN) for x in captions)
    numbers += tokens * encoders["text_encoder"].width
  return numbers * np.dtype(latents.DTYPES[dtype]).itemsize


def cut(
  found: Sequence[Found], tokenizer: pathlib.Path | None, tokens: int
) -> int:
  """Captions of usable clips with more tokens; 0 without a tokenizer."""
  if tokenizer is None:
    return 0
  texts = [text for x in found if x.reason is None for text in x.captions]
  counts = tokenize.Tokenizer.from_directory(tokenizer).count(texts)
  return int((counts > tokens).sum())


def repeating(found: Sequence[Found], fps: float | None) -> list[str]:
  """A line for each usable clip with so few frames that some are repeated."""
  slow = [
    f"  {x.file}: {x.fps:.4g} frames per second, some are repeated"
    for x in found
    if x.reason is None and timing.repeats(x.fps, fps)
  ]
  more = len(slow) - _LISTED
  return slow[:_LISTED] + ([f"  and {more} more"] if more > 0 else [])


def report(found: Sequence[Found], size_of: Any, notes: Sequence[str]) -> str:
  """The result for people.

  Args:
    found: all clips.
    size_of: bytes of one that can be used.
    notes: lines about those that can be used.
  """
  usable = [x for x in found if x.reason is None]
  lines = [f"{len(usable)} of {len(found)} clips can be used"]
  counts = collections.Counter(x.size for x in usable)
  for size, count in sorted(counts.items()):
    lines.append(f"  {str(size):>9}  {count}")
  seconds = [x.seconds for x in usable if x.seconds is not None]
  if seconds:
    lines.append(
      f"durations: {min(seconds):.1f} to {max(seconds):.1f} s, median "
      f"{statistics.median(seconds):.1f} s, {sum(seconds) / 3600:.2f} h in all"
    )
  total = sum(size_of(x) for x in usable)
  unit = next((u for u in _UNITS if total >= u[1]), _UNITS[-1])
  lines.append(f"about {total / unit[1]:.3g} {unit[0]} would be written")
  lines += notes
  out = [x for x in found if x.reason is not None]
  silent = sum(x.reason == _NO_CAPTION for x in out)
  if out:
    lines.append(
      f"left out: {silent} without a caption, {len(out) - silent} missing, "
      "damaged or too short"
    )
    lines += [f"  {x.file}: {x.reason}" for x in out[:_LISTED]]
  if len(out) > _LISTED:
    lines.append(f"  and {len(out) - _LISTED} more")
  return "\n".join(lines)
