"""What `launch.sample` is asked to make: prompts, images and seeds."""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import video as video_files

_KEYS = {"prompt", "negative_prompt", "image", "last_image", "seed"}
_LONGEST_SLUG = 40


class Request(NamedTuple):
  """One video.

  Attributes:
    prompt: the text.
    negative_prompt: None is the config's.
    image, last_image: files, or None.
    seed: of the noise.
  """

  prompt: str
  negative_prompt: str | None
  image: str | None
  last_image: str | None
  seed: int

  def name(self, index: int) -> str:
    """The file name without suffix: "00000_a-cat-walks_seed0"."""
    slug = re.sub(r"[^\w]+", "-", self.prompt.lower()).strip("-")
    slug = slug[:_LONGEST_SLUG].rstrip("-_") or "empty"
    return f"{index:05d}_{slug}_seed{self.seed}"


def gather(
  prompts: Sequence[str],
  file: str | None,
  seeds: Sequence[str],
  image: str | None,
  last_image: str | None,
) -> list[Request]:
  """One request per prompt and seed; all images have been looked at.

  Args:
    prompts: as given.
    file: with one prompt per line, or, if it ends in .jsonl, one object per
      line with "prompt" and maybe "negative_prompt", "image", "last_image",
      "seed"; None for none.
    seeds: whole numbers.
    image, last_image: for all prompts that name none of their own.

  Raises:
    errors.UserError: if there is no prompt, a seed is not a number, or a file
      is missing or damaged.
  """
  numbers = [_seed(text) for text in seeds]
  if not numbers:
    raise errors.UserError("expected at least one seed, found none")
  rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
  if file is not None:
    rows += _read(pathlib.Path(file))
  if not rows:
    raise errors.UserError("nothing to do: give --prompt or --prompts")
  requests = []
  for row in rows:
    for seed in [row["seed"]] if "seed" in row else numbers:
      requests.append(
        Request(
          row["prompt"],
          row.get("negative_prompt"),
          row.get("image", image),
          row.get("last_image", last_image),
          seed,
        )
      )
  for path in {x for r in requests for x in (r.image, r.last_image) if x}:
    read_image(path)
  return requests


def read_image(path: str | None) -> UInt8[np.ndarray, "h w 3"] | None:
  """Reads an image; None stays None.

  Raises:
    errors.UserError: if it is missing or not an image.
  """
  if path is None:
    return None
  if pathlib.Path(path).is_file() and not video_files.is_image(path):
    raise errors.UserError(f"{path} is not an image")
  return video_files.read_image(path)


def _seed(text: str) -> int:
  try:
    seed = int(text)
  except ValueError:
    seed = -1
  if not 0 <= seed < 2**32:
    raise errors.UserError(
      f"a seed is a whole number from 0 to {2**32 - 1}, found {text!r}"
    )
  return seed


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as e:
    reason = getattr(e, "strerror", None) or "it is not text"
    raise errors.UserError(f"cannot read the prompts {path}: {reason}") from e
  lines = [line.strip() for line in lines]
  if not any(lines):
    raise errors.UserError(f"{path} holds no prompt: expected one per line")
  if path.suffix != ".jsonl":
    return [{"prompt": line} for line in lines if line]
  return [
    _row(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line
  ]


def _row(where: str, line: str) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except ValueError as e:
    raise errors.UserError(f"{where} is not JSON: {e}") from e
  if not isinstance(row, dict) or "prompt" not in row:
    raise errors.UserError(f'{where}: expected an object with a "prompt"')
  if unknown := sorted(set(row) - _KEYS):
    raise errors.UserError(
      f"{where}: unknown keys {', '.join(unknown)}; known are "
      + ", ".join(sorted(_KEYS))
    )
  for key in sorted(_KEYS & set(row) - {"seed"}):
    if not isinstance(row[key], str):
      raise errors.UserError(f"{where}: {key} is no text: {row[key]!r}")
  if "seed" in row:
    row["seed"] = _seed(str(row["seed"]))
  return row
