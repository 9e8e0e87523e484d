"""The videos that VBench's lists of prompts ask for, and their files.

Follows VBench (commit 45e79ec): `prompts/README.md`, `vbench/__init__.py` and
`vbench2_beta_i2v/README.md`. A video is named PROMPT-K.mp4, K from 0 to 4, or
to 24 for a prompt of temporal flickering, of which a filter keeps the static
ones. VBench finds a video by the exact text of its prompt, whatever text the
model was given.

VBench takes the suffix of the first file that its folder lists for that of all
videos. So the folder of videos holds nothing else; the settings have their own:

  OUTPUT/videos/PROMPT-K.mp4
  OUTPUT/settings/PROMPT-K.json
"""

import hashlib
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.data import stills, tables

VIDEOS, SETTINGS = "videos", "settings"
# The folder of each kind of file, as `results.write` takes it.
FOLDERS = {".mp4": VIDEOS, ".json": SETTINGS}

_FLICKERING = "temporal_flickering"
# The text lists of one dimension that VBench offers, by name without .txt.
_LISTS = (
  *("appearance_style", "color", "human_action", "multiple_objects"),
  *("object_class", "overall_consistency", "scene", "spatial_relationship"),
  *("subject_consistency", _FLICKERING, "temporal_style"),
)
_SAMPLES, _FLICKERING_SAMPLES = 5, 25
_COLUMNS = ("prompt_en", "dimension", "image_name")
_LONGEST = 255  # bytes of a file name
_PER_PROMPT = 100_000  # between the seeds of two prompts, by number
_SEEDS = 2**32


class Prompt(NamedTuple):
  """A prompt of a list.

  Attributes:
    text: names the videos.
    row: number of the row in the list, from 0.
    dimensions: what VBench measures on its videos; empty if the list does not
      say.
    image: name of the image file, or None.
    samples: number of videos.
  """

  text: str
  row: int
  dimensions: tuple[str, ...]
  image: str | None
  samples: int

  def names(self) -> list[str]:
    """Returns the file names of the videos."""
    return [f"{self.text}-{k}.mp4" for k in range(self.samples)]


class Listed(NamedTuple):
  """A list of prompts.

  Attributes:
    path: the file.
    prompts: each once, in order.
    rows: number of rows of the file, in which prompts may repeat.
  """

  path: pathlib.Path
  prompts: list[Prompt]
  rows: int


class Video(NamedTuple):
  """One video to make, as `request_list.Request`.

  Attributes:
    prompt: the text that the model is given.
    negative_prompt: None takes that of the config.
    image: file of the first frame, or None.
    last_image: None.
    seed: of the noise.
    original: the prompt in VBench's list, which names the file.
    sample: K.
    row: number of the prompt's row in the list, from 0.
  """

  prompt: str
  negative_prompt: str | None
  image: str | None
  last_image: str | None
  seed: int
  original: str
  sample: int
  row: int

  def name(self, index: int = 0) -> str:
    """Returns the file name without suffix."""
    del index
    return f"{self.original}-{self.sample}"


def read(
  path: str, dimensions: Sequence[str] = (), samples: int | None = None
) -> Listed:
  """Reads a list of prompts, and checks that files can have their names.

  A prompt in two rows gets one set of videos, which VBench measures for both.
  They are those of the later row, which would overwrite the others.

  Args:
    path: VBench's `VBench_full_info.json` or `vbench2_i2v_full_info.json`, or a
      text file with a prompt per line. A text file with the name of a dimension
      has prompts of that dimension, as VBench's own lists do.
    dimensions: keeps only the prompts of these; empty keeps all.
    samples: videos per prompt; None is VBench's own number.

  Raises:
    errors.UserError: if the file is no such list, has no such dimension, or a
      prompt cannot be a file name.
  """
  file = pathlib.Path(path)
  rows = tables.read(file, _COLUMNS, {"prompt": _COLUMNS[:1]}, line="prompt_en")
  own = (file.stem,) if file.stem in _LISTS else ()
  found: dict[str, Prompt] = {}
  for number, (where, values) in enumerate(rows):
    prompt = _prompt(where, values, number, own, samples)
    if earlier := found.pop(prompt.text, None):
      both = dict.fromkeys((*earlier.dimensions, *prompt.dimensions))
      most = max(earlier.samples, prompt.samples)
      prompt = prompt._replace(dimensions=tuple(both), samples=most)
    found[prompt.text] = prompt
  if repeated := len(rows) - len(found):
    warnings.warn(
      f"{file}: {repeated} of {len(rows)} rows have the prompt of another row,"
      " and share its videos, with the number and text of the later row",
      stacklevel=2,
    )
  kept = [*found.values()]
  named = {p.image is None for p in kept}
  if len(named) > 1:
    raise errors.UserError(f"{file}: some rows have an image_name, others none")
  if dimensions:
    known = dict.fromkeys(d for p in kept for d in p.dimensions)
    for name in dimensions:
      if name not in known:
        raise errors.UserError(
          f"{file} has no prompts of the dimension {name}: expected some of "
          f"{', '.join(known) or 'none, as the list names no dimension'}"
        )
    kept = [p for p in kept if {*p.dimensions} & {*dimensions}]
  return Listed(file, kept, len(rows))


def _prompt(
  where: str,
  values: Mapping[str, Any],
  row: int,
  own: tuple[str, ...],
  samples: int | None,
) -> Prompt:
  text = tables.require_text(values.get("prompt_en"), f"{where}: prompt_en")
  names = values.get("dimension") or own
  names = (names,) if isinstance(names, str) else names
  if not isinstance(names, list | tuple) or not all(
    isinstance(name, str) for name in names
  ):
    raise errors.UserError(
      f"{where}: dimension must be a list of names, found {tables.short(names)}"
    )
  image = values.get("image_name")
  if image is not None:
    tables.require_text(image, f"{where}: image_name")
  # The image suite lists the dimension too, but its score does not take it.
  flickers = _FLICKERING in names and image is None
  usual = _FLICKERING_SAMPLES if flickers else _SAMPLES
  prompt = Prompt(text, row, tuple(names), image, samples or usual)
  if "/" in text:
    raise errors.UserError(
      f"{where}: VBench finds a video by its prompt, and no file name can hold"
      f" the slash of {tables.short(text)}"
    )
  size = len(prompt.names()[-1].removesuffix(".mp4").encode()) + len(".json")
  if size > _LONGEST:
    raise errors.UserError(
      f"{where}: the video of {tables.short(text)} would have a name of {size} "
      f"bytes, and a file name has at most {_LONGEST}: give VBench's own "
      "prompts with --vbench, and longer texts for them with "
      "--vbench_augmented"
    )
  return prompt


def read_augmented(path: str, listed: Listed) -> list[str]:
  """Reads texts to give the model instead of the prompts, in the same order.

  Raises:
    errors.UserError: if there is not one text for each row of the list.
  """
  columns = ("prompt", "prompt_en")
  rows = tables.read(path, columns, {"prompt": columns}, line="prompt")
  if len(rows) != listed.rows:
    raise errors.UserError(
      f"{path} has {len(rows)} texts, expected one for each of the "
      f"{listed.rows} rows of {listed.path}"
    )
  return [
    tables.require_text(
      next((values[x] for x in columns if x in values), None), where
    )
    for where, values in rows
  ]


def find_images(folder: str, ratio: str, listed: Listed) -> dict[str, str]:
  """Finds the crops of the image suite in one ratio of width to height.

  Args:
    folder: VBench's `data/crop` or the `data` above it, with a folder of crops
      for each ratio.
    ratio: such as "16-9".
    listed: names the images.

  Returns:
    The path of each image by its name.

  Raises:
    errors.UserError: if a folder or an image is missing, or is no image.
  """
  places = [pathlib.Path(folder) / x / ratio for x in ("", "crop")]
  place = next((x for x in places if x.is_dir()), None)
  if place is None:
    raise errors.UserError(
      f"there is no folder {places[0]}, expected crops in the ratio {ratio}, as"
      " VBench's crop.zip and its crop_to_diff_ratio.py have them"
    )
  names = dict.fromkeys(p.image for p in listed.prompts if p.image is not None)
  missing = [name for name in names if not (place / name).is_file()]
  if missing:
    raise errors.UserError(
      f"{place} lacks {len(missing)} of {len(names)} images, the first "
      f"{tables.short(missing[0])}"
    )
  found = {name: str(place / name) for name in names}
  for path in found.values():
    if stills.count(path) != 1:
      stills.read(path)  # Says what is wrong.
  return found


def videos(
  listed: Listed,
  *,
  augmented: Sequence[str] | None = None,
  images: Mapping[str, str] | None = None,
  rule: str = "drawn",
  base: int = 0,
) -> list[Video]:
  """Returns the videos that a list asks for.

  Args:
    listed: the list.
    augmented: texts for the model, of `read_augmented`; None gives it the
      prompts.
    images: of `find_images`; None for text to video.
    rule: of the seeds. "numbered" is 100000 i + k for the sample k of row i,
      both from 0, as VBench seeds Wan 2.1 14B (its issue 163). "drawn" takes a
      hash of prompt and k, so that no two videos share their noise, and a seed
      does not depend on the rest of the list.
    base: added to the seeds of "numbered", and hashed for those of "drawn".

  Raises:
    errors.UserError: if a list of images comes without images, or the other way
      round, or a seed is too large.
  """
  needs = any(p.image is not None for p in listed.prompts)
  if needs != (images is not None):
    raise errors.UserError(
      f"{listed.path} {'names' if needs else 'names no'} images, so "
      f"--vbench_images is {'needed' if needs else 'of no use'}"
    )
  last = base + _PER_PROMPT * (listed.rows - 1) + _PER_PROMPT
  if rule == "numbered" and last > _SEEDS:
    raise errors.UserError(
      f"{listed.path} has {listed.rows} rows, whose numbered seeds would exceed"
      f" {_SEEDS - 1}"
    )
  return [
    Video(
      prompt.text if augmented is None else augmented[prompt.row],
      None,
      images[prompt.image] if images and prompt.image is not None else None,
      None,
      base + _PER_PROMPT * prompt.row + k
      if rule == "numbered"
      else _drawn(base, prompt.text, k),
      prompt.text,
      k,
      prompt.row,
    )
    for prompt in listed.prompts
    for k in range(prompt.samples)
  ]


def _drawn(base: int, text: str, sample: int) -> int:
  digest = hashlib.sha256(f"{base}\0{text}\0{sample}".encode()).digest()
  return int.from_bytes(digest[:4], "big")
