"""What stands around and inside a model's names, by whoever saved it.

torch.compile, DDP, FSDP, activation checkpointing, Lightning and every trainer
put words in front of names, and some between them, in any order. Known are the
names of the model: whatever stands in front of them is taken off.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from dcvideogen_jax import errors
from dcvideogen_jax.convert import naming, reading

Tensors = Mapping[str, reading.Tensor]

# Words that modules which wrap others put between names.
_BETWEEN = {
  "_orig_mod",  # torch.compile
  "_checkpoint_wrapped_module",
  "_fsdp_wrapped_module",
  "_fpw_module",
}
# FSDP's parameters that are one flat array for many.
_FLAT = re.compile(r"(.*\.)?_flat_param(_\d+)?")
# Words of what holds EMA weights, and of models that are trained against one.
_EMA = {"ema", "averaged", "shadow"}
_OPPONENTS = {"critic", "discriminator", "fake", "real", "teacher"}
# Parts of a name that may stand in front of the model's.
_DEEPEST = 12


class Known(NamedTuple):
  """Names of a model: see `known`."""

  names: frozenset[str]
  ignored: tuple[re.Pattern[str], ...]


def known(
  layouts: Collection[Sequence[naming.Rule]],
  ignored: Sequence[str] = (),
  aliases: Collection[str] = (),
) -> Known:
  """The names of a model in all its layouts and in our own, without numbers.

  Args:
    layouts: tables of the model.
    ignored: regular expressions of names that hold nothing of ours.
    aliases: further names.
  """
  names = {
    name for rules in layouts for r in rules for name in (r.torch, r.jax)
  }
  return Known(
    frozenset(
      _numberless(re.sub(r"\{\w+\}", "0", n)) for n in names | {*aliases}
    ),
    tuple(re.compile(pattern) for pattern in ignored),
  )


def count(tensors: Tensors, names: Known) -> int:
  """How many tensors have a name of the model."""
  return sum(_numberless(name) in names.names for name in tensors)


def without_inner(where: str, tensors: Tensors) -> dict[str, reading.Tensor]:
  """The same tensors without the words that wrappers put between names.

  Raises:
    errors.UserError: if two have the same name then, or FSDP has made one
      array of many.
  """
  plain: dict[str, reading.Tensor] = {}
  for name, tensor in tensors.items():
    if _FLAT.fullmatch(name):
      raise errors.UserError(
        f"{where} holds flat parameters of FSDP ({errors.brief(name)}), which"
        " do not say what is in them: expected a full state dict"
      )
    parts = name.split(".")
    name = ".".join(part for part in parts if part not in _BETWEEN)
    if name in plain:
      raise errors.UserError(
        f"{where} holds {errors.brief(name)} twice, wrapped and not wrapped"
      )
    plain[name] = tensor
  return plain


def unwrap(where: str, kind: str, tensors: Tensors, names: Known) -> Tensors:
  """The model's tensors under their plain names.

  Of weights and their EMA, the EMA is taken, as DC-VideoGen's own code does; of
  a generator and its critic, the generator. In the first case and where tensors
  are left out, a warning says so.

  Args:
    where: what is read, for messages.
    kind: the model, for messages.
    tensors: by the names in the file.
    names: the model's.

  Returns:
    All that stands behind one prefix, also what is not the model's; everything
    where no name is known.

  Raises:
    errors.UserError: if there are several models of the kind.
  """
  found = _prefixes(tensors, names)
  if not found:
    return tensors
  ema = [p for p in found if _words(p) & _EMA]
  others = [p for p in found if p not in ema]
  # Of a model and those that it is trained against, the model.
  others = [p for p in others if not _words(p) & _OPPONENTS] or others
  prefix = _only(where, kind, others or _frequent(found))
  groups = _split(tensors, [*found])
  chosen = groups.pop(prefix)
  if others:
    chosen = _with_ema(where, kind, chosen, prefix, ema, groups)
  if left := [p + name for p, group in groups.items() for name in group]:
    warnings.warn(
      f"{where}: {kind} is what stands behind {prefix!r};"
      f" {len(left)} other tensors are left out, such as"
      f" {errors.brief(left[0])}",
      stacklevel=2,
    )
  return chosen


def without_passengers(where: str, tensors: Tensors, names: Known) -> Tensors:
  """The tensors without what repackers and trainers put beside a model.

  That is a tokenizer as bytes, a counter or a rate: integers or a single
  number, whose name has no parts and is not the model's. Bytes are told of.
  """
  passengers = {
    name: t
    for name, t in tensors.items()
    if not re.search(r"[./]", name)
    and _numberless(name) not in names.names
    and (not t.shape or jnp.issubdtype(t.dtype, jnp.integer))
  }
  if told := [name for name, t in passengers.items() if t.shape]:
    warnings.warn(
      f"{where}: left out {', '.join(map(errors.brief, told))}, bytes that lie"
      " beside the weights",
      stacklevel=2,
    )
  return {n: t for n, t in tensors.items() if n not in passengers}


def _numberless(name: str) -> str:
  return re.sub(r"\d+", "0", name)


def _words(prefix: str) -> set[str]:
  return set(re.split(r"[._]", prefix.lower()))


def _prefixes(tensors: Tensors, names: Known) -> dict[str, int]:
  """What stands in front of the model's names -> how many times.

  The shortest is taken of each name. What is a name by chance is far rarer
  than the model's, and is not counted unless it may be of EMA weights.
  """
  counts: dict[str, int] = {}
  for name in tensors:
    for prefix, rest in _ways(name):
      if _numberless(rest) in names.names:
        counts[prefix] = counts.get(prefix, 0) + 1
        break
      if any(expression.fullmatch(rest) for expression in names.ignored):
        break
  return {
    prefix: n
    for prefix, n in counts.items()
    if prefix in _frequent(counts) or _words(prefix) & _EMA
  }


def _frequent(counts: Mapping[str, int]) -> list[str]:
  return [p for p, n in counts.items() if 2 * n >= max(counts.values())]


def _ways(name: str) -> Iterator[tuple[str, str]]:
  """A name in two, at each of its dots."""
  at = 0
  for _ in range(_DEEPEST):
    yield name[:at], name[at:]
    at = name.find(".", at) + 1
    if not at:
      return


def _only(where: str, kind: str, prefixes: Sequence[str]) -> str:
  if len(prefixes) > 1:
    raise errors.UserError(
      f"{where} holds {len(prefixes)} models of {kind}, behind "
      + ", ".join(repr(errors.brief(p)) for p in prefixes)
      + ": expected one"
    )
  return prefixes[0]


def _split(
  tensors: Tensors, prefixes: Sequence[str]
) -> dict[str, dict[str, reading.Tensor]]:
  """Tensors by the longest of the prefixes that they have; "" is the rest."""
  ordered = sorted({*prefixes, ""}, key=len, reverse=True)
  groups: dict[str, dict[str, reading.Tensor]] = {p: {} for p in ordered}
  for name, tensor in tensors.items():
    prefix = next(p for p in ordered if name.startswith(p))
    groups[prefix][name.removeprefix(prefix)] = tensor
  return groups


def _with_ema(where, kind, chosen, prefix, ema, groups):
  """Tensors with those replaced of which there is an EMA."""
  fitting = [p for p in ema if groups[p].keys() & chosen.keys()]
  if not fitting:
    return chosen
  average = _only(where, kind, fitting)
  replaced = groups.pop(average)
  warnings.warn(
    f"{where}: {kind} is the average behind {average!r}, {len(replaced)}"
    f" tensors, in place of {prefix!r}",
    stacklevel=3,
  )
  return {**chosen, **replaced}
