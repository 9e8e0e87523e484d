"""Parses the device groups of a collective, in all of XLA's notations."""

import math
import re

import numpy as np

_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(
  r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{}]*)\))? ?\{([^}]*)\}"
)
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


def first(text: str) -> tuple[int, ...]:
  """Returns the numbers of the devices in the first group of a collective.

  For a collective-permute it is the first pair of different devices.

  Args:
    text: the instruction's text after its operands.

  Raises:
    ValueError: if the notation is unknown.
  """
  if found := _PAIRS.search(text):
    pairs = [_numbers(pair) for pair in re.findall(r"[\d,]+\d", found[1])]
    return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0][:1])
  if found := _LISTED.search(text):
    return _numbers(found[1])
  if found := _IOTA.search(text):
    groups = _ordered(found[2]).reshape(_numbers(found[1]))
    return tuple(map(int, groups[0]))
  if found := _MESH.search(text):
    return _of_mesh(*found.groups())
  raise ValueError(f"no known notation of device groups in {text!r}")


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(",")))


def _ordered(text: str) -> np.ndarray:
  """Returns device numbers in the order of a text such as `[2,8]T(1,0)`."""
  found = _ORDER.search(text)
  assert found is not None, text
  sizes = _numbers(found[1])
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(_numbers(found[2])) if found[2] else ids


def _of_mesh(axes: str, order: str | None, named: str) -> tuple[int, ...]:
  """Returns the first group along some axes of a mesh, or parts of axes.

  The part `'x':(2)4` of an axis of size 16 is the middle factor of 2 x 4 x 2.
  """
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
  parts = {
    name: (int(before), int(size)) if size else (1, sizes[name])
    for name, before, size in _AXIS.findall(named)
  }
  shape, chosen = [], []
  for name, n in sizes.items():
    if name in parts:
      before, size = parts[name]
      chosen.append(len(shape) + 1)
      shape += [before, size, n // (before * size)]
    else:
      shape.append(n)
  total = math.prod(sizes.values())
  ids = (_ordered(order) if order else np.arange(total)).reshape(shape)
  where = tuple(slice(None) if i in chosen else 0 for i in range(ids.ndim))
  return tuple(map(int, ids[where].ravel()))
