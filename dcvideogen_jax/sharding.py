"""Mesh from a config, partition rules over leaf names, logical constraints."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, tree

# A batch is split over the first two; "fsdp" also splits the train state, and
# "tensor" splits the work of single matrix products.
AXES = ("data", "fsdp", "tensor")
BATCH = P(AXES[:2])

# Logical activation axis -> mesh axes. A name that is not here is an error.
LOGICAL = {"batch": AXES[:2], None: None}

# Rule values: "replicate", "fsdp" (the largest dimension that the axis
# divides) or an explicit tuple with a mesh axis, a tuple of them or None per
# dimension.
Axis = str | tuple[str, ...] | None
Rule = tuple[str, str | tuple[Axis, ...]]


def make_mesh(
  config: Mapping[str, int], devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh with the axes "data", "fsdp" and "tensor".

  Devices that are near each other become neighbours on the last axes.

  Args:
    config: axis sizes, {"data": n, "fsdp": m, "tensor": k}; a left-out axis
      has size 1 and at most one may be -1, which means all devices that are
      left.
    devices: all of them unless given.

  Raises:
    errors.UserError: for an unknown axis, a size that is neither positive nor
      -1, or sizes whose product is not the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {axis: int(config.get(axis, 1)) for axis in AXES}
  if unknown := sorted(set(config) - set(AXES)):
    raise errors.UserError(
      f"mesh axes are {', '.join(AXES)}, found {', '.join(unknown)}"
    )
  bad = {a: n for a, n in sizes.items() if n < 1 and n != -1}
  if bad or list(sizes.values()).count(-1) > 1:
    raise errors.UserError(
      f"mesh sizes must be positive, at most one of them -1, found {sizes}"
    )
  known = math.prod(n for n in sizes.values() if n != -1)
  sizes = {a: len(devices) // known if n == -1 else n for a, n in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise errors.UserError(
      f"the mesh {sizes} needs {math.prod(sizes.values())} devices, "
      f"found {len(devices)}"
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def batch_devices(mesh: Mesh) -> int:
  """How many parts a batch is split into."""
  return math.prod(mesh.shape[axis] for axis in AXES[:2])


def process_part(mesh: Mesh) -> tuple[int, int]:
  """(index, count): which part of each batch this process has to read.

  Processes whose devices differ along "tensor" only read the same part.

  Raises:
    errors.UserError: if the mesh gives processes parts that overlap.
  """
  size = batch_devices(mesh)
  rows: dict[int, set[int]] = {}
  where: Mapping[Any, Any] = NamedSharding(mesh, BATCH).devices_indices_map(
    (size,)
  )
  for device, (row,) in where.items():
    rows.setdefault(device.process_index, set()).update(range(size)[row])
  parts = sorted({tuple(sorted(part)) for part in rows.values()})
  if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != size:
    raise errors.UserError(
      f"the mesh {dict(mesh.shape)} does not split batches evenly between "
      f"{len(rows)} processes"
    )
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def _spec(
  name: str, shape: tuple[int, ...], rule: Any, mesh: Mesh
) -> tuple[P, str | None]:
  """The spec of one leaf, and why a rule does not fit it (None if it does)."""
  if rule == "replicate":
    return P(), None
  if rule == "fsdp":
    size = mesh.shape["fsdp"]
    fits = [i for i, n in enumerate(shape) if n % size == 0 and n > 0]
    if size == 1 or not fits:
      return P(), None
    largest = max(fits, key=lambda i: shape[i])
    return P(*[None] * largest, "fsdp"), None
  if isinstance(rule, str) or len(rule) != len(shape):
    return P(), f"{name} {shape}: {rule!r} does not name its dimensions"
  spec: list[tuple[str, ...] | None] = []
  for n, value in zip(shape, rule, strict=True):
    axes = (value,) if isinstance(value, str) else tuple(value or ())
    if unknown := [axis for axis in axes if axis not in mesh.shape]:
      return P(), f"{name} {shape}: {unknown[0]!r} is no mesh axis"
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if n % devices:
      return P(), (
        f"{name} {shape}: {n} is not a multiple of the {devices} devices of "
        f"{value!r}"
      )
    spec.append(axes or None)
  return P(*spec), None


def specs(state: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
  """A tree of `PartitionSpec`s for `state`, from rules over leaf names.

  The value "fsdp" falls back to a copy on every device where no dimension is
  divisible (small biases, scalars); those names are logged. An explicit tuple
  never falls back.

  Args:
    state: arrays or `jax.ShapeDtypeStruct`s, usually the whole train state.
    mesh: as from `make_mesh`.
    rules: ordered (regular expression, value); values as in `Rule`.

  Raises:
    errors.UserError: lists all leaves that no rule covers, or all explicit
      rules that do not divide their leaf.
  """
  sizes = tree.shapes(state)
  found = tree.match(rules, sizes)
  out, wrong, copied = [], [], []
  for name, shape in sizes.items():
    spec, problem = _spec(name, shape, found[name], mesh)
    out.append(spec)
    if problem:
      wrong.append(problem)
    if found[name] == "fsdp" and spec == P() and mesh.shape["fsdp"] > 1:
      copied.append(name)
  if wrong:
    raise errors.UserError("sharding rules do not fit: " + "; ".join(wrong))
  if copied:
    logging.info("not divisible, so replicated: %s", ", ".join(copied))
  return jax.tree.unflatten(jax.tree.structure(state), out)


def shardings(state: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
  """`specs` as a tree of `NamedSharding`s.

  Raises:
    errors.UserError: as `specs`.
  """
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs(state, mesh, rules),
    is_leaf=lambda x: isinstance(x, P),
  )


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
  """Constrains the sharding of an activation; returns `x` without a mesh.

  The mesh is the one set by `jax.set_mesh`, so model code stays free of it.

  Args:
    x: any array.
    *logical_axes: one name of `LOGICAL` per dimension; trailing ones may be
      left out and are, like None, not split.

  Raises:
    errors.UserError: for an unknown name, or a dimension that the mesh does
      not divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  if unknown := [a for a in logical_axes if a not in LOGICAL]:
    raise errors.UserError(
      f"logical axes are {', '.join(filter(None, LOGICAL))}, found {unknown}"
    )
  for n, logical in zip(x.shape, logical_axes, strict=False):
    devices = math.prod(mesh.shape[axis] for axis in LOGICAL[logical] or ())
    if n % devices:
      raise errors.UserError(
        f"{logical!r} of size {n} cannot be split over {devices} devices"
      )
  spec = P(*(LOGICAL[logical] for logical in logical_axes))
  return jax.lax.with_sharding_constraint(x, spec)
