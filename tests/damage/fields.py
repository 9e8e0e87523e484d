"""Fields that make no sense in JSON, tables and texts that are well formed."""

import copy
import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

from tests.damage.bytewise import Random, choice

# Stand for what `json` would not write.
_NESTED, _DIGITS, _HUGE = "@nested@", "@digits@", "@huge@"
_RAW = {
  f'"{_NESTED}"': "[" * 100_000 + "]" * 100_000,
  f'"{_DIGITS}"': "9" * 5000,
  f'"{_HUGE}"': "1e999",
}
ABSURD = (
  *(None, True, False, 0, 1, -1, 0.5, -0.5, 3.0, 1e308, 1e-300),
  *(math.nan, math.inf, -math.inf, 2**31, -(2**63), 10**18, 10**400),
  *("", "4", "text", "\ud800", "\0", "x" * 5000, "../../out", "/", "*", "("),
  *("config.json", "diffusion_pytorch_model.safetensors.index.json"),
  *([], {}, [[]], [None], {"a": {}}, _NESTED, _DIGITS, _HUGE),
)


def written(value: Any) -> str:
  text = json.dumps(value)
  for stand_in, raw in _RAW.items():
    text = text.replace(stand_in, raw)
  return text


def short(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 40 else f"{text[:20]}... ({len(text)})"


def _places(document: Any, path=()) -> list[tuple]:
  """The paths to all values below the document."""
  if isinstance(document, dict):
    pairs = list(document.items())
  elif isinstance(document, list):
    pairs = list(enumerate(document))
  else:
    return []
  found = []
  for key, value in pairs:
    found += [(*path, key), *_places(value, (*path, key))]
  return found


def _holder(document: Any, path: tuple) -> Any:
  for key in path[:-1]:
    document = document[key]
  return document


def change_field(document: Any, random: Random) -> tuple[Any, str]:
  """Changes one field of what JSON can hold; the document may be changed."""
  places = _places(document)
  if not places or random.random() < 0.05:
    value = choice(random, ABSURD)
    return value, f"all of it is {short(value)}"
  path = choice(random, places)
  holder, key = _holder(document, path), path[-1]
  where = ".".join(map(str, path))
  action = choice(
    random, ["set", "set", "set", "set", "copy", "lose", "swap", "rename"]
  )
  if action == "set":
    holder[key] = choice(random, ABSURD)
    return document, f"{where} is {short(holder[key])}"
  if action == "copy":
    other = choice(random, places)
    holder[key] = copy.deepcopy(_holder(document, other)[other[-1]])
    return document, f"{where} is as {'.'.join(map(str, other))}"
  if action == "swap":
    other = choice(random, places)
    elsewhere = _holder(document, other)
    inside = path[: len(other)] == other or other[: len(path)] == path
    if not inside:
      pair = elsewhere[other[-1]], holder[key]
      holder[key], elsewhere[other[-1]] = pair
    return document, f"{where} and {'.'.join(map(str, other))} are swapped"
  if action == "rename" and isinstance(holder, dict):
    name = choice(random, ["", "x" * 5000, "\ud800", "a/b", f"{key}.0"])
    holder[name] = holder.pop(key)
    return document, f"{where} is called {short(name)}"
  del holder[key]
  return document, f"{where} is missing"


def in_json(content: bytes, random: Random) -> tuple[bytes, str]:
  document = json.loads(content)
  if isinstance(document, dict) and random.random() < 0.05:
    key, value = choice(random, document), choice(random, ABSURD)
    text = f"{written(document)[:-1]}, {written({key: value})[1:]}"
    return text.encode(), f"{key} comes twice, last as {short(value)}"
  document, description = change_field(document, random)
  return written(document).encode(), description


def in_lines(content: bytes, random: Random) -> tuple[bytes, str]:
  """One line of a file of JSON lines."""
  lines = content.decode().splitlines()
  number = int(random.integers(len(lines)))
  document, description = change_field(json.loads(lines[number]), random)
  lines[number] = written(document)
  return "\n".join(lines).encode() + b"\n", f"line {number + 1}: {description}"


def in_table(content: bytes, random: Random) -> tuple[bytes, str]:
  """One cell, row or the manner of a table of comma-separated values."""
  rows = list(csv.reader(io.StringIO(content.decode())))
  row = int(random.integers(len(rows)))
  column = int(random.integers(len(rows[row])))
  action = choice(random, ["set", "set", "set", "lose", "header", "manner"])
  description = f"cell {row}, {column}"
  options: dict[str, Any] = {}
  if action == "set":
    value = choice(random, [*ABSURD, "y" * 200_000])
    text = value if isinstance(value, str) else written(value)
    rows[row][column] = _RAW.get(f'"{text}"', text)
    description += f" is {short(value)}"
  elif action == "lose":
    del rows[row][column]
    description += " is missing"
  elif action == "header":
    del rows[0]
    description = "the first row is missing"
  else:
    options["delimiter"] = choice(random, ";\t|")
    description = f"the delimiter is {options['delimiter']!r}"
  file = io.StringIO()
  csv.writer(file, **options).writerows(rows)
  text = file.getvalue()
  if action == "manner" and random.random() < 0.3:
    text, description = text.replace('"', "", 1), "a quotation mark is missing"
  return text.encode("utf-8", "surrogatepass"), description


def in_text(content: bytes, random: Random) -> tuple[bytes, str]:
  """Lines of text, or how they are written."""
  text = content.decode()
  lines = text.splitlines()
  changes: dict[str, Callable[[], bytes]] = {
    "in UTF-16": lambda: text.encode("utf-16"),
    "in Latin-1": lambda: text.encode("latin-1", "replace"),
    "with a byte order mark": lambda: text.encode("utf-8-sig"),
    "with Windows' ends of lines": lambda: text.encode().replace(
      b"\n", b"\r\n"
    ),
    "of white space": lambda: b" \n\t\n  \n",
    "with a lone surrogate": lambda: content + b"\xed\xa0\x80 cat\n",
    "with NUL": lambda: content.replace(b" ", b"\0", 1),
    "with a line of a megabyte": lambda: content + b"word " * 200_000,
    "with a line less": lambda: "\n".join(lines[1:]).encode(),
    "on one line": lambda: " ".join(lines).encode(),
  }
  name = choice(random, changes)
  return changes[name](), name
