"""Counts traffic, collectives and FLOPs in the HLO text of compiled programs.

The compiler's own figures count the body of a loop only once, and ignore the
inside of kernels. Here the body of a loop counts once per iteration.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.plan import hlo_flops, replica_groups

_KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# Opcodes that move no data: they name buffers, or call computations that are
# counted themselves.
_FREE = (
  "add-dependency after-all async-start async-update async-done bitcast call"
  " conditional constant get-tuple-element opt-barrier parameter partition-id"
  " replica-id tuple while"
).split()
_WORK = {"convolution": hlo_flops.convolution, "dot": hlo_flops.dot}
_SLICES = ("dynamic-slice", "gather", "slice")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
  """All collectives of one kind over the same groups of devices.

  Attributes:
    kind: such as "all-gather".
    group: numbers of the devices of one of the groups.
    overlaps: whether the device may compute meanwhile.
    count: number of times that the collectives run.
    bytes: bytes that a device receives in all runs together.
  """

  kind: str
  group: tuple[int, ...]
  overlaps: bool
  count: int
  bytes: int


class _Array(NamedTuple):
  sizes: tuple[int, ...]
  bits: int
  fast: bool  # Whether it is in a faster memory than the device's main memory.


class _Instruction(NamedTuple):
  name: str
  arrays: tuple[_Array, ...]
  opcode: str
  operands: tuple[str, ...]
  rest: str


class Program:
  """The computations of a compiled program, parsed from HLO text."""

  def __init__(self, text: str):
    """Parses the text of `compiled.as_text()`."""
    self._computations: dict[str, dict[str, _Instruction]] = {}
    self._roots: dict[str, _Instruction] = {}
    for line in text.splitlines():
      if head := _HEAD.match(line):
        name = head[2]
        self._computations[name] = {}
        if head[1]:
          self._entry = name
      elif found := _LINE.match(line):
        instruction = _parse(found[2], found[3])
        self._computations[name][instruction.name] = instruction
        if found[1]:
          self._roots[name] = instruction

  def collectives(self) -> list[Collective]:
    """Returns the collectives of the program, those with most bytes first.

    Raises:
      errors.UserError: if the number of iterations of a loop is unknown.
    """
    total = collections.Counter[tuple[str, tuple[int, ...], bool]]()
    counts = collections.Counter[tuple[str, tuple[int, ...], bool]]()
    for computation, times in self._runs():
      channels = {}
      for found, fused in self._transfers(computation):
        # An overlapping collective may be spread over several fusions.
        channel = re.search(r"channel_id=\d+", found.rest)
        channels.setdefault(
          channel and channel[0] or found.name, (found, fused)
        )
      for found, fused in channels.values():
        kind = found.opcode.removesuffix("-start")
        group = replica_groups.first(found.rest)
        key = kind, group, fused or kind != found.opcode
        counts[key] += times
        total[key] += times * _received(found, len(group))
    return [
      Collective(*key, counts[key], size) for key, size in total.most_common()
    ]

  def traffic(self) -> int:
    """Returns a lower bound of the bytes read from and written to memory.

    These are the operands and results of all instructions and fusions, except
    arrays in a faster memory. Data that a kernel reads twice counts once.

    Raises:
      errors.UserError: if the number of iterations of a loop is unknown.
    """
    return sum(
      times * self._moved(computation, instruction)
      for computation, times in self._runs()
      for instruction in self._computations[computation].values()
    )

  def flops(self) -> int:
    """Returns the FLOPs of one device in matrix products and convolutions.

    A multiply-add is two FLOPs. Kernels and calls of libraries do not count.

    Raises:
      errors.UserError: if the number of iterations of a loop is unknown.
    """
    return sum(
      times * self._worked(computation) for computation, times in self._runs()
    )

  def _worked(self, computation: str) -> int:
    inside = self._computations[computation]
    total = 0
    for _, arrays, opcode, operands, rest in inside.values():
      if opcode in _WORK:
        sizes = [inside[o].arrays[0].sizes for o in operands]
        total += _WORK[opcode](arrays[0].sizes, *sizes, rest)
      elif opcode == "fusion":
        total += sum(map(self._worked, _called(rest)))
    return total

  def _runs(self) -> list[tuple[str, int]]:
    """Returns the computations except fusions, and how often each runs."""
    found = collections.Counter[str]()

    def walk(name, times):
      found[name] += times
      for instruction in self._computations[name].values():
        rest = instruction.rest
        if instruction.opcode == "while":
          walk(_named(rest, "body"), times * self._trip_count(instruction))
        # All branches of a conditional count; the models have none.
        elif instruction.opcode in ("call", "conditional", "async-start"):
          for called in _called(rest):
            walk(called, times)

    walk(self._entry, 1)
    return [*found.items()]

  def _trip_count(self, loop: _Instruction) -> int:
    """Returns the number of iterations of a loop.

    Loops of `jax.lax.scan`, and loops that XLA makes, count from zero up to a
    constant.

    Raises:
      errors.UserError: if the number is known only when the program runs.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    condition = _named(loop.rest, "condition")
    inside = self._computations[condition]
    for name in self._roots[condition].operands:
      if inside[name].opcode == "constant":
        return int(inside[name].operands[0])
    source = re.search(r'op_name="([^"]*)"', loop.rest)
    raise errors.UserError(
      "what the program does cannot be counted: how often the loop "
      f"{loop.name} runs ({source[1] if source else 'of unknown source'}) is "
      "known only once it runs"
    )

  def _transfers(
    self, computation: str, fused: bool = False
  ) -> Iterator[tuple[_Instruction, bool]]:
    fused |= "async" in computation
    for instruction in self._computations[computation].values():
      if instruction.opcode.removesuffix("-start") in _KINDS:
        yield instruction, fused
      elif instruction.opcode == "fusion":
        for called in _called(instruction.rest):
          for found, _ in self._transfers(called, fused=True):
            # XLA for TPUs writes a reduce-scatter, for which the device waits,
            # as such a fusion.
            scatters = called.startswith("all-reduce-scatter")
            if scatters:
              found = found._replace(
                opcode="reduce-scatter", arrays=instruction.arrays
              )
            yield found, not scatters

  def _moved(self, computation: str, instruction: _Instruction) -> int:
    """Returns the bytes that one instruction reads and writes."""
    _, _, opcode, operands, rest = instruction
    if opcode in _FREE or "AllocateBuffer" in rest:
      return 0
    inside = self._computations[computation]
    total = 0
    if not opcode.endswith("-done"):
      for i, operand in enumerate(operands):
        if operand in inside and _bytes(inside[operand].arrays):
          total += self._read(inside, instruction, i)
    if not opcode.endswith("-start"):
      total += self._written(inside, instruction)
    return total

  def _read(self, inside, instruction, i: int) -> int:
    """Returns the bytes that an instruction reads of its operand `i`."""
    _, arrays, opcode, operands, rest = instruction
    if opcode == "fusion":
      (called,) = _called(rest)
      inside = self._computations[called]
      return self._used(inside, _parameter(inside, i).name)
    if i == 0 and opcode in _SLICES:
      return _bytes(arrays, everywhere=True)
    if opcode == "slice-start":  # Its results: operand, slice and a context.
      return _bytes(arrays[1:2], everywhere=True)
    if i == 0 and opcode == "dynamic-update-slice":
      return 0
    return _bytes(inside[operands[i]].arrays, everywhere=True)

  def _used(self, inside, name: str) -> int:
    """Returns the bytes that a fusion reads of a buffer."""
    total = 0
    for user in inside.values():
      for i, operand in enumerate(user.operands):
        if operand == name:
          total += (
            self._used(inside, user.name)
            if user.opcode == "bitcast"
            else self._read(inside, user, i)
          )
    return min(total, _bytes(inside[name].arrays, everywhere=True))

  def _written(self, inside, instruction) -> int:
    """Returns the bytes that an instruction writes."""
    _, arrays, opcode, operands, rest = instruction
    if opcode == "dynamic-update-slice":
      return _bytes(inside[operands[1]].arrays) if _bytes(arrays) else 0
    if opcode != "fusion":
      return _bytes(arrays)
    (called,) = _called(rest)
    inside, root = self._computations[called], self._roots[called]
    parts = [root]
    if root.opcode == "tuple":
      parts = [inside[part] for part in root.operands]
    if len(arrays) != len(parts):  # One of the parts is itself a tuple.
      return _bytes(arrays)
    total = 0
    for array, part in zip(arrays, parts, strict=True):
      while part.opcode == "bitcast":
        part = inside[part.operands[0]]
      updates = part.opcode == "dynamic-update-slice" and _bytes([array])
      total += self._written(inside, part) if updates else _bytes([array])
    return total


def _parse(name: str, text: str) -> _Instruction:
  end = _closing(text, 0) if text[0] == "(" else text.index(" ")
  shape, rest = text[:end], text[end:].lstrip()
  start = rest.index("(")
  end = _closing(rest, start)
  inside = rest[start + 1 : end - 1]
  operands = re.findall(r"%([\w.\-]+)", inside) or [inside]
  arrays = tuple(map(_array, _ARRAY.finditer(shape)))
  return _Instruction(name, arrays, rest[:start], tuple(operands), rest[end:])


def _array(found: re.Match[str]) -> _Array:
  name, bits, sizes, layout = found.groups()
  # A predicate takes a byte; tokens take no memory.
  width = 8 if name == "pred" else int(bits or 0)
  numbers = (int(n.lstrip("<=")) for n in sizes.split(",") if n)
  return _Array(tuple(numbers), width, "S(" in (layout or ""))


def _closing(text: str, start: int) -> int:
  """Returns the position after the parenthesis that closes that at `start`."""
  depth = 0
  for match in re.finditer(r"[()]", text[start:]):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return start + match.end()
  raise ValueError(f"unbalanced parentheses in {text!r}")


def _named(rest: str, key: str) -> str:
  found = re.search(rf"{key}=%?([\w.\-]+)", rest)
  assert found is not None, rest
  return found[1]


def _called(rest: str) -> list[str]:
  branches = _BRANCHES.search(rest)
  named = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
  return _CALLED.findall(rest) + named


def _parameter(inside, i: int) -> _Instruction:
  return next(
    x
    for x in inside.values()
    if x.opcode == "parameter" and x.operands == (str(i),)
  )


def _bytes(arrays: Iterable[_Array], everywhere: bool = False) -> int:
  """Returns the bytes of arrays; `everywhere` adds those in faster memory."""
  return sum(
    math.prod(array.sizes) * array.bits // 8
    for array in arrays
    if everywhere or not array.fast
  )


def _received(found: _Instruction, devices: int) -> int:
  """Returns the bytes that a device receives from others in a collective."""
  arrays, kind = found.arrays, found.opcode.removesuffix("-start")
  if kind == "collective-permute":
    return _bytes(arrays[:1], everywhere=True)
  if found.opcode == "all-gather-start":
    arrays = arrays[len(arrays) // 2 :]
  size = _bytes(arrays, everywhere=True)
  if kind == "reduce-scatter":
    return size * (devices - 1)
  rounds = 2 if kind == "all-reduce" else 1
  return rounds * size * (devices - 1) // devices
