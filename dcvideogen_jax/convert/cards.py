"""Model cards: a README.md beside converted weights, as hubs show it.

A licence is that of the source's own card, or the one that is given. It is
never guessed.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Keys of a card's head that say under which licence the weights are.
_KEYS = ("license", "license_name", "license_link")
NAME = "README.md"


class Licence(NamedTuple):
  """A licence, and where it is from.

  Attributes:
    fields: of the head of a card, such as {"license": "apache-2.0"}.
    origin: says who said so.
  """

  fields: Mapping[str, str]
  origin: str


def licence(
  source: str | os.PathLike[str], given: str | None = None
) -> Licence | None:
  """Returns the licence of weights, or None if nobody says one.

  Args:
    source: the weights; the card beside them, or one folder above, counts.
    given: replaces that of the source.
  """
  if given:
    return Licence({"license": given}, "as given with --license")
  path = pathlib.Path(source)
  for folder in (path, path.parent) if path.is_dir() else (path.parent,):
    found = _head(folder / NAME)
    if "license" in found:
      return Licence(found, f"by {folder.name or folder}/{NAME} of the source")
  return None


def repository(source: str | os.PathLike[str]) -> str | None:
  """Returns "owner/name, commit HASH" for files of Hugging Face's cache."""
  match = re.search(
    r"models--([^/]+?)--([^/]+)/snapshots/(\w+)", os.fspath(source)
  )
  return match and f"{match[1]}/{match[2]}, commit {match[3]}"


def card(
  *,
  kind: str,
  variant: str,
  parameters: int,
  tensors: int,
  dtypes: Sequence[str],
  files: Mapping[str, int],
  source: str | os.PathLike[str],
  command: str,
  version: str,
  adapters: Sequence[str] = (),
  terms: Licence | None = None,
) -> str:
  """Returns a model card in Markdown.

  Args:
    kind, variant: of the model.
    parameters, tensors: their numbers.
    dtypes: of the parameters.
    files: bytes of each file of weights, by its name.
    source: where the weights were read.
    command: that converted them.
    version: of this package.
    adapters: files that were merged, as `--lora` names them.
    terms: the licence, or None if it is not known.
  """
  head = ["---", "library_name: diffusers"]
  if terms:
    head += [f"{key}: {value}" for key, value in terms.fields.items()]
  published = repository(source)
  total = sum(files.values())
  lines = [
    *head,
    "---",
    "",
    f"# {kind}, {variant}",
    "",
    "Converted weights: the numbers are those of the source"
    + (", with adapters merged." if adapters else "."),
    "",
    "| | |",
    "|---|---|",
    f"| parameters | {parameters:,} in {tensors:,} tensors |",
    f"| dtypes | {', '.join(dtypes)} |",
    f"| size | {total / 1e9:.3f} GB in {len(files)} files |",
    *(f"| `{name}` | {size:,} bytes |" for name, size in files.items()),
    "",
    "## Provenance",
    "",
    f"- source: `{source}`",
    *([f"- repository: {published}"] if published else []),
    *(f"- merged adapter: `{adapter}`" for adapter in adapters),
    f"- converted by dcvideogen_jax {version}:",
    "",
    "```bash",
    command,
    "```",
    "",
    "## Licence",
    "",
    _terms(terms),
    *(
      ["Merged adapters have licences of their own, which may restrict it."]
      if adapters
      else []
    ),
    "",
  ]
  return "\n".join(lines)


def _terms(terms: Licence | None) -> str:
  if terms is None:
    return (
      "Not known: the source has no card that says one, and none was given."
      " Ask its authors before you pass the weights on."
    )
  named = ", ".join(terms.fields.values())
  return f"{named}, {terms.origin}."


def _head(path: pathlib.Path) -> dict[str, Any]:
  """Returns the fields about the licence in the head of a card."""
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError):
    return {}
  head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
  if head is None:
    return {}
  found = {}
  for line in head[1].splitlines():
    key, colon, value = line.partition(":")
    value = value.partition(" #")[0].strip().strip("\"'")
    # A value on further lines is a list, which names no single licence.
    if colon and key in _KEYS and value:
      found[key] = value
  return found
