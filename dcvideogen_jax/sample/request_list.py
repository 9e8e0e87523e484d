"""The videos that `dcvideogen sample` shall make: prompts, images and seeds."""

import os
import pathlib
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import stills, tables

_TEXTS = ("prompt", "negative_prompt", "image", "last_image")
_KEYS = (*_TEXTS, "seed")
_LONGEST_SLUG = 40


class Request(NamedTuple):
  """One video to make.

  Attributes:
    prompt: the text.
    negative_prompt: None takes that of the config.
    image, last_image: files of the first and the last frame, or None.
    seed: of the noise.
  """

  prompt: str
  negative_prompt: str | None
  image: str | None
  last_image: str | None
  seed: int

  def name(self, index: int) -> str:
    """Returns the file name without suffix: "00000_a-cat-walks_seed0"."""
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
  """Makes one request per prompt and seed, and reads all images as a check.

  Args:
    prompts: the prompts of the command line.
    file: more prompts, or None: a table that `tables.read` takes, with the
      column "prompt" and optionally "negative_prompt", "image", "last_image"
      and "seed"; or a .txt file with a prompt per line.
    seeds: whole numbers, for all prompts without a seed of their own.
    image, last_image: for all prompts without images of their own.

  Raises:
    errors.UserError: if there is no prompt or no seed, a prompt is not text, a
      seed is not a whole number in range, or a file is missing or damaged.
  """
  numbers = [seed(text) for text in seeds]
  if not numbers:
    raise errors.UserError("expected at least one seed, found none")
  rows: list[dict[str, Any]] = [
    {"prompt": tables.require_text(prompt, "the prompt")} for prompt in prompts
  ]
  if file is not None:
    rows += _read(pathlib.Path(file))
  if not rows:
    raise errors.UserError("nothing to do: give --prompt or --prompts")
  requests = []
  for row in rows:
    for number in [row["seed"]] if "seed" in row else numbers:
      requests.append(
        Request(
          row["prompt"],
          row.get("negative_prompt"),
          row.get("image", image),
          row.get("last_image", last_image),
          number,
        )
      )
  for path in {x for r in requests for x in (r.image, r.last_image)}:
    read_image(path)
  return requests


def check(requests: Sequence[Request], task: str, image: bool = True) -> None:
  """Refuses images that the task does not take, and requests that lack one.

  Args:
    requests: of `gather`.
    task: "t2v" or "i2v".
    image: whether image to video needs an image; False for a stream that
      continues a video.

  Raises:
    errors.UserError: names the prompt.
  """
  for request in requests:
    if task == "i2v" and request.image is None and image:
      raise errors.UserError(
        f"image to video needs an image, and {request.prompt!r} has none"
      )
    if task == "t2v" and (request.image or request.last_image):
      raise errors.UserError(
        f"text to video takes no image, and {request.prompt!r} has one"
      )


def read_noise(path: str) -> Float[np.ndarray, "1 t h w c"]:
  """Reads the noise of one video from a .npy file, `t h w c`.

  Raises:
    errors.UserError: if the file is missing, damaged or not a .npy file, or
      does not hold floats.
  """
  try:
    found = np.load(path, allow_pickle=False)
  except OSError as e:
    raise errors.UserError(
      f"cannot read --noise={path}: {e.strerror or e}"
    ) from e
  # NumPy's own message advises to load such files as pickles, which run code.
  except (ValueError, EOFError) as e:
    raise errors.UserError(
      f"--noise={path} is no .npy file of numbers, or is damaged"
    ) from e
  if not isinstance(found, np.ndarray):
    found.close()
    raise errors.UserError(
      f"--noise={path} is an archive, expected a .npy file"
    )
  if not np.issubdtype(found.dtype, np.floating):
    raise errors.UserError(
      f"--noise={path} must hold floats, found {found.dtype}"
    )
  return found[None]


def read_image(path: str | None) -> UInt8[np.ndarray, "h w 3"] | None:
  """Reads an image; returns None for None.

  Raises:
    errors.UserError: if it is missing or not an image.
  """
  if path is None:
    return None
  if not path:
    raise errors.UserError("the name of an image is empty, expected a file")
  if not os.path.exists(path):
    raise errors.UserError(f"the image {tables.short(path)} does not exist")
  return stills.read(path)


def seed(text: str, where: str = "") -> int:
  """Reads a seed; `where` begins the message of an error.

  Raises:
    errors.UserError: if it is not a whole number from 0 to 2^32 - 1.
  """
  try:
    number = int(text)
  except ValueError:
    number = -1
  if not 0 <= number < 2**32:
    raise errors.UserError(
      f"{where}a seed is a whole number from 0 to {2**32 - 1}, found "
      f"{tables.short(text)}"
    )
  return number


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  rows = tables.read(path, _KEYS, {"prompt": ("prompt",)}, line="prompt")
  silent = sum(
    "negative_prompt" in x and x["negative_prompt"] is None for _, x in rows
  )
  if silent:
    warnings.warn(
      f"{path}: {silent} of {len(rows)} rows have null or an empty cell for a "
      'negative_prompt and get the config\'s; "" in .jsonl is an empty one',
      stacklevel=3,
    )
  return [_row(where, values) for where, values in rows]


def _row(where: str, values: dict[str, Any]) -> dict[str, Any]:
  """Checks a row, and leaves out its empty cells."""
  row = {key: value for key, value in values.items() if value is not None}
  if "prompt" not in row:
    raise errors.UserError(f'{where}: expected a "prompt", found {sorted(row)}')
  if unknown := sorted(row.keys() - {*_KEYS}):
    raise errors.UserError(
      f"{where}: unknown keys {', '.join(unknown)[:200]}; known are "
      f"{', '.join(_KEYS)}"
    )
  for key in row.keys() & {*_TEXTS}:
    tables.require_text(row[key], f"{where}: {key}")
  if "seed" in row:
    row["seed"] = seed(str(row["seed"]), f"{where}: ")
  return row
