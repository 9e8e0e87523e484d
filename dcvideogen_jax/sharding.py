"""Meshes from configs, partition rules for parameters, activation sharding."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, tree
from dcvideogen_jax.arrays import Array

# Mesh axes, and the dimensions that each of them shards:
#
#   data     the batch
#   fsdp     the batch, and the train state
#   tensor   heads and hidden features, within single matrix products
#   context  the tokens of a sample, and columns of the autoencoder's images
#   spatial  columns of the autoencoder's images
AXES = ("data", "fsdp", "tensor", "context", "spatial")
BATCH = P(AXES[:2])

# Logical activation axis -> mesh axes. Any other name is an error. "heads" are
# the heads inside attention, where each device has all tokens of a sample;
# "hidden" are features or heads where the tokens are sharded.
LOGICAL: dict[str | None, tuple[str, ...]] = {
  "batch": AXES[:2],
  "tokens": ("context",),
  "heads": ("tensor", "context"),
  "hidden": ("tensor",),
  "columns": ("context", "spatial"),
  None: (),
}
# Logical axes that may be padded: the last shards hold fewer elements. "batch"
# is one of them, as models are also initialised and run with batches that are
# smaller than in training.
UNEVEN = ("batch", "tokens", "columns")

# A leaf of at least this many bytes that is replicated although its rule shards
# it gets a warning.
_LARGE = 2**26
# Warnings already given, as planning computes shardings again and again.
_said: set[str] = set()

# A rule is a regular expression over leaf names, and one of these values:
#
# - "replicate";
# - mesh axes such as "fsdp" or "fsdp+context", which shard the largest
#   dimension that they divide;
# - a tuple with an entry per dimension: a mesh axis, a tuple of mesh axes, or
#   None. The entry "fsdp+context?" shards the dimension as far as it divides:
#   over both axes, over "fsdp" alone, or not at all.
Axis = str | tuple[str, ...] | None
Rule = tuple[str, str | tuple[Axis, ...]]


def make_mesh(
  config: Mapping[str, int], devices: Sequence[Any] | None = None
) -> Mesh:
  """Makes a mesh with all of `AXES`.

  Devices that are near each other become neighbours on the last axes.

  Args:
    config: axis sizes, such as {"data": 2, "fsdp": 4}. An axis that is left out
      has size 1. At most one size may be -1, for all remaining devices.
    devices: devices of the mesh; None is all of `jax.devices()`. Devices of a
      `jax.experimental.topologies` description, which need not exist, work too.

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
  rest = max(1, len(devices) // known)
  sizes = {a: rest if n == -1 else n for a, n in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise errors.UserError(
      f"the mesh {sizes} needs {math.prod(sizes.values())} devices, "
      f"found {len(devices)}"
    )
  # Unlike this call, jax.make_mesh splits an axis of the torus between two mesh
  # axes only on v5e.
  grid = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_devices(mesh: Mesh) -> int:
  """Returns the number of shards of a batch."""
  return num_shards(mesh, "batch")


def num_shards(mesh: Mesh | AbstractMesh, logical: str | None) -> int:
  """Returns the number of shards of a logical axis.

  A mesh axis that `mesh` does not have counts as one device.

  Raises:
    errors.UserError: for a name that is not in `LOGICAL`.
  """
  if logical not in LOGICAL:
    raise errors.UserError(
      f"logical axes are {', '.join(filter(None, LOGICAL))}, found {logical!r}"
    )
  return _product(LOGICAL[logical], mesh)


def _product(axes: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
  return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def process_part(mesh: Mesh) -> tuple[int, int]:
  """Returns (index, count): the part of each batch that this process reads.

  Processes whose devices differ only along "tensor", "context" or "spatial"
  read the same part.

  Raises:
    errors.UserError: if the mesh gives processes overlapping or unequal parts.
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
  """Returns the spec of a leaf, and why its rule does not fit, or None."""
  if rule == "replicate":
    return P(), None
  if isinstance(rule, str):
    return _largest(name, shape, rule.split("+"), mesh)
  if len(rule) != len(shape):
    return P(), f"{name} {shape}: {rule!r} does not name its dimensions"
  spec: list[tuple[str, ...]] = []
  for n, value in zip(shape, rule, strict=True):
    axes = _axes(value)
    if unknown := [axis for axis in axes if axis not in mesh.shape]:
      return P(), f"{name} {shape}: {unknown[0]!r} is no mesh axis"
    while _is_optional(value) and n % _product(axes, mesh):
      axes = axes[:-1]
    if n % (count := _product(axes, mesh)):
      return P(), (
        f"{name} {shape}: {n} is not a multiple of the {count} devices of "
        f"{value!r}"
      )
    spec.append(axes)
  if twice := _repeated(spec):
    return P(), f"{name} {shape}: {rule!r} has the mesh axis {twice!r} twice"
  return P(*(_brief(axes, mesh) for axes in spec)), None


def _is_optional(value: Any) -> bool:
  """Whether a dimension's mesh axes are dropped if they do not divide it."""
  return isinstance(value, str) and value.endswith("?")


def _axes(value: Any) -> tuple[str, ...]:
  """Returns the mesh axes of one dimension of a rule."""
  if isinstance(value, str):
    return tuple(value.removesuffix("?").split("+"))
  return tuple(value or ())


def _brief(axes: Sequence[str], mesh: Mesh) -> Axis:
  """Returns mesh axes as a spec's entry; several lose those of size 1."""
  if len(axes) > 1:
    axes = [axis for axis in axes if mesh.shape[axis] > 1]
  return tuple(axes) if len(axes) > 1 else axes[0] if axes else None


def _largest(
  name: str, shape: tuple[int, ...], axes: Sequence[str], mesh: Mesh
) -> tuple[P, str | None]:
  """`_spec` for mesh axes: shards the largest dimension that they divide.

  If no dimension is divided by all axes, the last axis is dropped, and so on.
  """
  if unknown := [axis for axis in axes if axis not in mesh.shape]:
    return P(), f"{name} {shape}: {unknown[0]!r} is no mesh axis"
  for count in range(len(axes), 0, -1):
    size = _product(axes[:count], mesh)
    fits = [i for i, n in enumerate(shape) if n % size == 0 and n > 0]
    if size > 1 and fits:
      largest = max(fits, key=lambda i: shape[i])
      return P(*[None] * largest, _brief(axes[:count], mesh)), None
  return P(), None


def _repeated(spec: Sequence[tuple[str, ...]]) -> str | None:
  """Returns the first mesh axis that a spec names twice, or None."""
  axes = [axis for part in spec for axis in part]
  return next((a for i, a in enumerate(axes) if a in axes[:i]), None)


def specs(state: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
  """Returns a tree of `PartitionSpec`s for `state`, from rules over leaf names.

  The value "fsdp" falls back to replication where no dimension is divisible
  (small biases, scalars), and "fsdp+context" to "fsdp". A tuple falls back only
  with "?". Leaves of 64 MiB and more that are replicated although their rule
  names mesh axes are warned of, once.

  Args:
    state: arrays or `jax.ShapeDtypeStruct`s, usually the whole train state.
    mesh: a mesh from `make_mesh`.
    rules: ordered pairs of a regular expression and a value; see `Rule`. The
      first rule that matches the whole name of a leaf counts.

  Raises:
    errors.UserError: lists all leaves that no rule covers, or all rules that
      name an unknown mesh axis, one axis twice, or do not divide their leaf.
  """
  sizes = tree.shapes(state)
  found = tree.match(rules, sizes)
  out, wrong = [], []
  for name, shape in sizes.items():
    spec, problem = _spec(name, shape, found[name], mesh)
    out.append(spec)
    if problem:
      wrong.append(problem)
  if wrong:
    raise errors.UserError("sharding rules do not fit: " + "; ".join(wrong))
  _say_copied(state, mesh, found, out)
  return jax.tree.unflatten(jax.tree.structure(state), out)


def _say_copied(
  state: Any, mesh: Mesh, found: Mapping[str, Any], out: Sequence[P]
) -> None:
  """Warns of large leaves that are replicated although their rule shards them.

  Args:
    state, mesh: as for `specs`.
    found: the value of each leaf's rule, by the leaf's name.
    out: the spec of each leaf, in flatten order.
  """
  large = []
  for (name, leaf), spec in zip(tree.flatten(state).items(), out, strict=True):
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    shard = NamedSharding(mesh, spec).shard_shape(leaf.shape)
    if size >= _LARGE and shard == leaf.shape and _named(found[name]):
      large.append((size, name))
  if not large or mesh.size == 1:
    return
  size, name = max(large)
  sizes = {axis: n for axis, n in mesh.shape.items() if n > 1}
  message = (
    f"{len(large)} arrays, {sum(n for n, _ in large) / 2**30:.1f} GiB, lie "
    f"whole on each of {mesh.size} devices, such as {name} "
    f"({size / 2**30:.1f} GiB): the mesh {sizes} does not split them by the "
    f"rule {found[name]!r}"
  )
  if message not in _said:
    _said.add(message)
    warnings.warn(message, stacklevel=3)


def _named(rule: Any) -> bool:
  """Whether the value of a rule names mesh axes to shard a leaf over."""
  if isinstance(rule, str):
    return rule != "replicate"
  return any(_axes(value) for value in rule)


def shardings(state: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
  """Returns `specs` as a tree of `NamedSharding`s.

  Args:
    state, mesh: as for `specs`.
    rules: as for `specs`.

  Raises:
    errors.UserError: as `specs`.
  """
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs(state, mesh, rules),
    is_leaf=lambda x: isinstance(x, P),
  )


def constrain(x: Array, *logical_axes: str | None) -> Array:
  """Constrains the sharding of an activation; without a mesh, returns `x`.

  The mesh is the one set by `jax.set_mesh`, so models need not know it. A mesh
  axis that it does not have counts as one device.

  Args:
    x: any array.
    *logical_axes: one name of `LOGICAL` per dimension. Dimensions with None,
      and trailing ones that are left out, are not sharded.

  Raises:
    errors.UserError: for an unknown name, two names that share a mesh axis, or
      a dimension that the mesh does not divide and whose name is not in
      `UNEVEN`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  for n, logical in zip(x.shape, logical_axes, strict=False):
    count = num_shards(mesh, logical)
    if n % count and logical not in UNEVEN:
      raise errors.UserError(
        f"{logical!r} of size {n} cannot be split over {count} devices"
      )
  spec = activation_spec(mesh, *logical_axes)
  return jax.lax.with_sharding_constraint(x, spec)


def activation_spec(mesh: Mesh | AbstractMesh, *logical_axes: str | None) -> P:
  """Returns the spec of an activation whose dimensions have these names.

  Raises:
    errors.UserError: for an unknown name, or two that share a mesh axis.
  """
  spec = []
  for logical in logical_axes:
    num_shards(mesh, logical)
    spec.append(tuple(a for a in LOGICAL[logical] if a in mesh.shape))
  if twice := _repeated(spec):
    raise errors.UserError(
      f"{logical_axes} would split two dimensions over {twice!r}"
    )
  return P(*(axes or None for axes in spec))


def divisible_spec(
  mesh: Mesh | AbstractMesh, shape: Sequence[int], *logical_axes: str | None
) -> P:
  """Returns `activation_spec`, with only the names that divide the shape.

  Arrays that enter or leave a compiled program cannot be sharded unevenly.

  Args:
    mesh: the mesh.
    shape: shape of the array.
    *logical_axes: as for `activation_spec`.
  """
  return activation_spec(
    mesh,
    *(
      None if n % num_shards(mesh, logical) else logical
      for n, logical in zip(shape, logical_axes, strict=False)
    ),
  )


def to_host(x: Any) -> np.ndarray:
  """Copies a whole array to this process's host memory.

  If the array is sharded over several processes, all of them must call this, in
  the same order.
  """
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return np.asarray(x)
  if x.is_fully_replicated:
    return np.asarray(x.addressable_data(0))
  return multihost_utils.process_allgather(x, tiled=True)
