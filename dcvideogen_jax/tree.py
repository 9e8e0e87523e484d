"""Names of the leaves of pytrees, and ordered rules over these names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from dcvideogen_jax import errors

T = TypeVar("T")


def names(tree: Any) -> list[str]:
  """Returns names of leaves such as "params/encoder/kernel", in flatten order.

  Attribute, dictionary and sequence keys are all joined with "/". As in
  `jax.tree`, None is an empty subtree, not a leaf.
  """
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
  ]


def flatten(tree: Any) -> dict[str, Any]:
  """Returns the leaves by their names, in flatten order."""
  return dict(zip(names(tree), jax.tree.leaves(tree), strict=True))


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns shapes by leaf name, of arrays or `jax.ShapeDtypeStruct`s."""
  return {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}


def match(
  rules: Sequence[tuple[str, T]], leaves: Iterable[str]
) -> dict[str, T]:
  """Returns, by name, the value of the first rule that matches a whole name.

  Args:
    rules: ordered (regular expression, value) pairs.
    leaves: names to look up.

  Raises:
    errors.UserError: lists every name that no rule covers, or the first
      regular expression that does not compile.
  """
  compiled = []
  for pattern, value in rules:
    try:
      compiled.append((re.compile(pattern), value))
    except re.error as e:
      raise errors.UserError(
        f"{pattern!r} is not a regular expression: {e}"
      ) from e
  found, uncovered = {}, []
  for leaf in leaves:
    for expression, value in compiled:
      if expression.fullmatch(leaf):
        found[leaf] = value
        break
    else:
      uncovered.append(leaf)
  if uncovered:
    patterns = ", ".join(repr(pattern) for pattern, _ in rules) or "none"
    raise errors.UserError(
      f"no rule covers {', '.join(uncovered)}; the rules are: {patterns}"
    )
  return found


def match_tree(rules: Sequence[tuple[str, Any]], tree: Any) -> Any:
  """Returns `match` for each leaf of `tree`, as a tree of the same structure.

  Raises:
    errors.UserError: as `match`.
  """
  leaves = names(tree)
  found = match(rules, leaves)
  return jax.tree.unflatten(
    jax.tree.structure(tree), [found[leaf] for leaf in leaves]
  )


def split(tree: Mapping[str, Any], mask: Mapping[str, Any]) -> tuple[Any, Any]:
  """Splits a tree into (kept, rest): leaves where `mask` is true, and others.

  Args:
    tree: nested dictionaries.
    mask: nested dictionaries of the same structure with bools, as from
      `match_tree`.

  Returns:
    Two trees of nested dictionaries, without empty ones.
  """
  kept: dict[str, Any] = {}
  rest: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      parts = split(value, mask[key])
    else:
      parts = (value, {}) if mask[key] else ({}, value)
    for part, found in zip((kept, rest), parts, strict=True):
      if not (isinstance(found, Mapping) and not found):
        part[key] = found
  return kept, rest


def merge(kept: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
  """Merges two trees again that `split` has made.

  Raises:
    ValueError: if both hold the same leaf.
  """
  merged = {**kept, **rest}
  for key in kept.keys() & rest.keys():
    if not isinstance(kept[key], Mapping) or not isinstance(rest[key], Mapping):
      raise ValueError(f"{key!r} is a leaf of both trees, or of one")
    merged[key] = merge(kept[key], rest[key])
  return merged
