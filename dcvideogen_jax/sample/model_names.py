"""Parses the flags `--model`, `--source`, `--config` and `--lora`."""

import importlib.resources
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dcvideogen_jax import convert, documents, errors
from dcvideogen_jax.sample import hub

# Directories of shipped weights, by their names for --model.
_SHIPPED = {"tiny": "dc_ae_v_tiny"}


def weights(name: str) -> pathlib.Path:
  """Returns the path of weights, given by path or as the name of shipped ones.

  Raises:
    errors.UserError: if there is no such file or directory.
  """
  if name in _SHIPPED:
    assets = importlib.resources.files("dcvideogen_jax") / "assets"
    path = pathlib.Path(str(assets / _SHIPPED[name]))
  else:
    path = pathlib.Path(name)
  if not os.path.exists(path):
    raise errors.UserError(
      f"there are no weights at {path}: expected a directory, a .safetensors,"
      " .gguf, .pt, .pth, .bin or .ckpt file, an .index.json, or one of"
      f" {[*_SHIPPED]}"
    )
  return path


def video(name: str) -> str:
  """Returns a path; "demo" is the shipped clip unless a file has that name."""
  if name != "demo" or os.path.exists(name):
    return name
  assets = importlib.resources.files("dcvideogen_jax") / "assets"
  return str(assets / "demo.mp4")


class LoraFile(NamedTuple):
  """A file of LoRA or of another adapter, as `--lora` names it.

  Attributes:
    path: the file or directory.
    scale: factor of its updates.
    skip: patterns of the names of tensors that are left out, as
      `convert.load_lora` takes them.
  """

  path: str
  scale: float = 1.0
  skip: tuple[str, ...] = ()


def lora(text: str) -> LoraFile:
  """Parses "PATH", "PATH,SCALE", and any number of ",skip=PATTERN" behind.

  Raises:
    errors.UserError: if there is no such file, the scale is not finite or comes
      last, or a pattern is empty or no regular expression.
  """
  path, *skip = text.split(",skip=")
  for pattern in skip:
    if not pattern or re.search(r",[\d.+-]+$", pattern):
      raise errors.UserError(
        f"--lora={text}: expected PATH,SCALE,skip=PATTERN, with a scale before"
        " the patterns"
      )
    try:
      re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
      raise errors.UserError(
        f"--lora={text}: skip={pattern} is no regular expression: {e}"
      ) from e
  start, comma, end = path.rpartition(",")
  try:
    path, scale = (start, float(end)) if comma else (path, 1.0)
  except ValueError:
    scale = 1.0
  if not os.path.exists(path):
    raise errors.UserError(
      f"--lora={text}: there is no file {path} (a scale is a number after a"
      " comma, and skip=PATTERN comes last)"
    )
  if not math.isfinite(scale):
    raise errors.UserError(f"--lora={text}: the scale must be finite")
  return LoraFile(path, scale, tuple(skip))


def merge_loras(
  kind: str, module: Any, variables: Any, loras: Sequence[LoraFile]
) -> Any:
  """Adds LoRA and other adapters to a model, and prints what changes.

  Args:
    kind: a key of `convert.KINDS`.
    module, variables: the model; its parameters are donated.
    loras: files, as `lora` returns them.

  Raises:
    errors.UserError: if a file is damaged or belongs to another model.
  """
  found = []
  for path, scale, skip in loras:
    updates = convert.load_lora(kind, path, module, scale, skip)
    found.append(updates)
    left_out = f", {updates.skipped} tensors left out" if skip else ""
    print(
      f"{path}: {updates.matched} tensors matched{left_out},"
      f" {len(updates.changed)} parameters change, rank {updates.rank},"
      f" scale {scale:g}",
      flush=True,
    )
  added = convert.add(found)
  return {"params": convert.merge(variables["params"], added, donate=True)}


def with_loras(transformer: Any, loras: Sequence[LoraFile]) -> Any:
  """Returns a transformer with LoRA merged into it, as `merge_loras`.

  Args:
    transformer: a module and its variables, a named tuple; the variables are
      donated.
    loras: files, as `lora` returns them.

  Raises:
    errors.UserError: as `merge_loras`.
  """
  module, variables = transformer
  merged = merge_loras("wan_dit", module, variables, loras)
  return transformer._replace(variables=merged)


def pipeline(name: str) -> str:
  """Returns the directory or repository of a whole model; "tiny" ships.

  Raises:
    errors.UserError: if `name` is neither.
  """
  if name == "tiny":
    assets = importlib.resources.files("dcvideogen_jax") / "assets"
    return str(assets / "dcvideogen_tiny")
  if not os.path.isdir(name) and not hub.is_repository(name):
    raise errors.UserError(
      f"there is no model {name}: expected tiny, a directory, or a Hugging"
      " Face repository owner/name@revision"
    )
  return name


def config(text: str | None) -> str | Mapping[str, Any] | None:
  """Parses the text of a flag into the `config` that `convert.load` takes.

  Raises:
    errors.UserError: if a file cannot be read or the JSON is not an object.
  """
  if not text:
    return None
  if not text.endswith(".json") and not text.lstrip().startswith("{"):
    return text
  found = fields(text, "--config")
  found.pop("kind", None)
  return found


def fields(text: str, flag: str) -> dict[str, Any]:
  """Parses the JSON object that a flag holds, or the .json file that it names.

  Raises:
    errors.UserError: if a file cannot be read or the JSON is not an object.
  """
  if text.endswith(".json"):
    flag = text
    try:
      text = pathlib.Path(text).read_text()
    except (OSError, UnicodeDecodeError) as e:
      reason = getattr(e, "strerror", None) or "it is not text"
      raise errors.UserError(f"cannot read {flag}: {reason}") from e
  try:
    found = documents.parse(text)
  except ValueError as e:
    raise errors.UserError(f"{flag} is not valid JSON: {e}") from e
  if not isinstance(found, dict):
    raise errors.UserError(
      f"{flag}: expected an object of fields, found {type(found).__name__}"
    )
  return found


def variant(kind: str, module: Any) -> str:
  """Returns a module's released variant by name, or "own configuration"."""
  found = convert.api.config_of(module)
  for name, fields in convert.KINDS[kind].variants.items():
    released = convert.KINDS[kind].build(fields)
    if convert.api.config_of(released) == found:
      return name
  return "own configuration"
