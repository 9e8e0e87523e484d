"""Removes what wrappers and trainers add to the names of a model's tensors.

torch.compile, DDP, FSDP, activation checkpointing, Lightning and every trainer
put words in front of names, and some wrappers put them between the parts of a
name, in any order. The names of the model are known, so everything in front of
them is removed.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from dcvideogen_jax import errors
from dcvideogen_jax.convert import naming, reading

Tensors = Mapping[str, reading.Tensor]

# Words that wrapping modules put between the parts of a name.
_BETWEEN = {
  "_orig_mod",  # torch.compile
  "_checkpoint_wrapped_module",
  "_fsdp_wrapped_module",
  "_fpw_module",
}
# FSDP's flat parameters: one array that holds many parameters.
_FLAT = re.compile(r"(.*\.)?_flat_param(_\d+)?")
# Words in the prefixes of EMA weights, and of models that a trainer stores
# beside the model, such as its critic.
_EMA = {"ema", "averaged", "shadow"}
_OPPONENTS = {"critic", "discriminator", "fake", "real", "teacher"}
# Number of splits of a name into prefix and model's name that are tried.
_DEEPEST = 12


class Known(NamedTuple):
  """The names of a model; see `known`.

  Attributes:
    names: names with every number replaced by 0.
    ignored: patterns of names that are not loaded.
  """

  names: frozenset[str]
  ignored: tuple[re.Pattern[str], ...]


def known(
  layouts: Collection[Sequence[naming.Rule]],
  ignored: Sequence[str] = (),
  aliases: Collection[str] = (),
) -> Known:
  """Collects the names of a model in all its layouts and in JAX.

  Args:
    layouts: the model's tables.
    ignored: regular expressions of names that are not loaded, because the model
      here has no such parameter.
    aliases: additional names.
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
  """Counts the tensors that have a name of the model."""
  return sum(_numberless(name) in names.names for name in tensors)


def without_inner(where: str, tensors: Tensors) -> dict[str, reading.Tensor]:
  """Removes the words that wrappers put between the parts of names.

  Raises:
    errors.UserError: if two tensors then have the same name, or if the source,
      called `where`, holds flat parameters of FSDP.
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
  """Selects the model's tensors and removes the prefix of their names.

  If a file holds weights and their EMA, the EMA is taken, as in DC-VideoGen's
  own code. If it holds a generator and its critic, the generator is taken. A
  warning names an EMA that is taken, and tensors that are left out.

  Args:
    where: the source, for messages.
    kind: the kind of model, for messages.
    tensors: tensors by their names in the file.
    names: the names of the model.

  Returns:
    All tensors behind the model's prefix, including those that the model does
    not have; all tensors of the source if it holds no name of the model.

  Raises:
    errors.UserError: if there are several models of the kind.
  """
  found = _prefixes(tensors, names)
  if not found:
    return tensors
  ema = [p for p in found if _words(p) & _EMA]
  others = [p for p in found if p not in ema]
  # The model is preferred to the models that are trained against it.
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
  """Leaves out what repackers and trainers store beside a model's weights.

  This is a tokenizer as bytes, a counter or a learning rate: an array of
  integers or a single number whose name has no dot or slash and is not a name
  of the model. A warning names the arrays that are left out.

  Args:
    where: the source, for messages.
    tensors: tensors by name.
    names: the names of the model.
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
  """Counts the prefixes in front of the model's names.

  Each tensor counts for its shortest prefix. A prefix in front of a name that
  is the model's by chance is far rarer than the others; it is left out unless
  it may be a prefix of EMA weights.
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
  """Yields a name as prefix and rest, split at its start and after each dot."""
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
  """Groups tensors by their longest prefix; "" is the group of the others."""
  ordered = sorted({*prefixes, ""}, key=len, reverse=True)
  groups: dict[str, dict[str, reading.Tensor]] = {p: {} for p in ordered}
  for name, tensor in tensors.items():
    prefix = next(p for p in ordered if name.startswith(p))
    groups[prefix][name.removeprefix(prefix)] = tensor
  return groups


def _with_ema(where, kind, chosen, prefix, ema, groups):
  """Replaces the chosen tensors that have an EMA by it."""
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
