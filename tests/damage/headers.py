"""Headers that make no sense: of safetensors, and the pickles of PyTorch."""

import io
import json
import math
import pickle
import pickletools
import zipfile
from typing import Any

from tests.damage import bytewise
from tests.damage.bytewise import Random, choice
from tests.damage.fields import change_field, short, written

# --- safetensors -------------------------------------------------------------


def in_safetensors(content: bytes, random: Random) -> tuple[bytes, str]:
  """One field of the header, or its length."""
  length = int.from_bytes(content[:8], "little")
  header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
  names = [name for name in header if name != "__metadata__"]
  action = choice(random, ["entry", "entry", "entry", "any", "length", "data"])
  if action == "length":
    length = int(
      choice(
        random, [0, 1, length - 1, length + 1, 2**31, 2**63 - 1, 2**64 - 1]
      )
    )
    return (
      length.to_bytes(8, "little") + content[8:],
      f"the header's length is {length}",
    )
  if action == "data":
    surplus = int(random.integers(1, 64))
    return content + bytes(surplus), f"{surplus} bytes more"
  if action == "any":
    header, description = _metadata(header, random)
  else:
    name = choice(random, names)
    description = _entry(header, name, choice(random, names), random)
  text = written(header).encode()
  return len(text).to_bytes(8, "little") + text + data, description


def _metadata(header, random: Random):
  """Any field of the header, or of the JSON in the text of one."""
  texts = header.get("__metadata__", {})
  described = [name for name in texts if texts[name].startswith("{")]
  if not described or random.random() < 0.3:
    return change_field(header, random)
  name = choice(random, described)
  found, description = change_field(json.loads(texts[name]), random)
  texts[name] = written(found)
  return header, f"{name}: {description}"


def _entry(header, name: str, other: str, random: Random) -> str:
  """Shape, dtype and place of one tensor."""
  entry, neighbour = header[name], header[other]
  shape, (first, last) = entry["shape"], entry["data_offsets"]
  size = last - first
  changes = {
    "dtype": [
      "F32",
      "F16",
      "BF16",
      "I32",
      "I64",
      "F8_E4M3",
      "F4",
      "U16",
      "f32",
    ],
    "shape": [
      [-n for n in shape],
      [float(n) for n in shape],
      [str(n) for n in shape],
      [*shape, 0],
      [*shape, 1],
      shape[::-1],
      [2**62, 2**62],
      [10**30],
      [True, *shape],
      math.prod(shape),
      None,
      neighbour["shape"],
    ],
    "data_offsets": [
      [last, first],
      [first - size, last - size],
      [-size, 0],
      [-8, size - 8],
      [float(first), float(last)],
      [first + 0.5, last + 0.5],
      [first, last, last],
      [first],
      [first + 2, last + 2],
      [2**63, 2**63 + size],
      [str(first), str(last)],
      neighbour["data_offsets"],
      None,
    ],
  }
  field = choice(random, changes)
  entry[field] = choice(random, changes[field])
  return f"{field} of {name} is {short(entry[field])}"


# --- PyTorch -----------------------------------------------------------------

_NUMBERS = (0, 1, -1, -4, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**62, 2**64)
_TEXTS = (
  *("", "text", "../0", "1", "torch DoubleStorage", "torch HalfStorage"),
  *("torch LongStorage", "torch FloatTensor", "os system", "cpu"),
)


def in_torch(content: bytes, random: Random) -> tuple[bytes, str]:
  """A number or a text of the pickle, or a member of the archive."""
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  (pickled,) = (name for name in members if name.endswith("data.pkl"))
  action = choice(random, ["pickle", "pickle", "pickle", "member", "squeeze"])
  compression = zipfile.ZIP_STORED
  if action == "pickle":
    members[pickled], description = _opcode(members[pickled], random)
  elif action == "member":
    name = choice(random, members)
    members[name], description = bytewise.change(members[name], random)
    description = f"{name}: {description}"
  else:
    compression, description = zipfile.ZIP_DEFLATED, "it is compressed"
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", compression) as archive:
    for name, member in members.items():
      archive.writestr(zipfile.ZipInfo(name), member, compression)
  return file.getvalue(), description


def _opcode(pickled: bytes, random: Random) -> tuple[bytes, str]:
  """Changes the argument of one operation of a pickle, or leaves it out."""
  found = [*pickletools.genops(pickled)]
  ends = [position for _, _, position in found[1:]] + [len(pickled)]
  kinds = ("number", "number", "number", "text", "lose")
  kind, chosen = choice(random, kinds), []
  for (opcode, argument, start), end in zip(found, ends, strict=True):
    if opcode.name.startswith("BININT"):
      of = "number"
    elif opcode.name == "BINUNICODE" or opcode.name == "GLOBAL":
      of = "text"
    else:
      of = "lose"
    if of == kind and start > 1:
      chosen.append((opcode, argument, start, end))
  opcode, argument, start, end = choice(random, chosen)
  new = b""
  value: Any = None
  if kind == "number":
    value = int(choice(random, _NUMBERS))
    new = pickle.dumps(value, 2)[2:-1]
  elif opcode.name == "GLOBAL":
    value = choice(random, [text for text in _TEXTS if " " in text])
    new = b"c" + value.replace(" ", "\n").encode() + b"\n"
  elif kind == "text":
    value = choice(random, _TEXTS)
    new = b"X" + len(value).to_bytes(4, "little") + value.encode()
  description = f"{opcode.name} {argument!r} at {start} is {value!r}"
  return pickled[:start] + new + pickled[end:], description
