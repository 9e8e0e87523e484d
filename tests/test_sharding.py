"""Meshes, partition rules and constraints on eight fake devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, sharding


@pytest.mark.parametrize(
  ("config", "shape"),
  [
    ({}, None),
    ({"data": -1}, (8, 1, 1, 1, 1)),
    ({"data": 2, "fsdp": 4}, (2, 4, 1, 1, 1)),
    ({"data": 2, "fsdp": -1}, (2, 4, 1, 1, 1)),
    ({"fsdp": 2, "tensor": -1}, (1, 2, 4, 1, 1)),
    ({"tensor": 2, "context": 2, "spatial": 2}, (1, 1, 2, 2, 2)),
    ({"data": -1, "fsdp": -1}, None),
    ({"data": 3, "fsdp": -1}, None),
    ({"data": 0, "fsdp": 8}, None),
    ({"data": 8, "model": 1}, None),
  ],
)
def test_mesh(config, shape):
  if shape is None:
    with pytest.raises(errors.UserError):
      sharding.make_mesh(config)
  else:
    assert sharding.make_mesh(config).devices.shape == shape


def test_one_device_of_several_makes_a_mesh():
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  assert mesh.size == sharding.batch_devices(mesh) == 1


def _abstract(**shapes):
  return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}


@pytest.fixture
def mesh():
  return sharding.make_mesh({"data": 2, "fsdp": 4})


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((3, 3, 3, 8, 16), P(None, None, None, None, "fsdp")),
    ((3, 3, 3, 16, 8), P(None, None, None, "fsdp")),
    ((4, 4), P("fsdp")),
    ((6,), P()),
    ((), P()),
  ],
)
def test_fsdp_takes_the_largest_divisible_dimension(mesh, shape, spec):
  found = sharding.specs(_abstract(a=shape), mesh, [(".*", "fsdp")])
  assert found == {"a": spec}


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((16, 24), P(None, ("fsdp", "context"))),
    ((6, 12), P(None, "fsdp")),  # 8 does not divide 12, 4 does.
    ((6,), P()),
  ],
)
def test_several_axes_split_the_largest_dimension(shape, spec):
  mesh = sharding.make_mesh({"fsdp": 4, "context": 2})
  rules = [(".*", "fsdp+tensor+context")]
  assert sharding.specs(_abstract(a=shape), mesh, rules) == {"a": spec}


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((16, 2), P(("fsdp", "context"), "tensor")),
    ((6, 2), P("fsdp", "tensor")),
    ((3, 2), P(None, "tensor")),
    ((16, 3), None),
  ],
)
def test_an_explicit_rule_gives_way_where_it_says_so(shape, spec):
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "context": 2})
  rules = [(".*", ("fsdp+context?", "tensor"))]
  if spec is None:
    with pytest.raises(errors.UserError, match="3 is not a multiple of the 2"):
      sharding.specs(_abstract(a=shape), mesh, rules)
  else:
    assert sharding.specs(_abstract(a=shape), mesh, rules) == {"a": spec}


def test_first_rule_wins_and_explicit_tuples_are_kept(mesh):
  rules = [("a", (None, "data")), ("b", "replicate"), (".*", "fsdp")]
  state = _abstract(a=(4, 4), b=(8, 8), c=(8, 8))
  assert sharding.specs(state, mesh, rules) == {
    "a": P(None, "data"),
    "b": P(),
    "c": P("fsdp"),
  }


def test_a_dimension_may_be_split_over_several_axes():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rules = [(".*", (None, ("fsdp", "tensor")))]
  where = sharding.shardings(_abstract(a=(3, 8)), mesh, rules)["a"]
  assert where.spec == P(None, ("fsdp", "tensor"))
  assert where.shard_shape((3, 8)) == (3, 2)
  # Rules of a stored config come back as lists.
  rules = [[".*", [None, ["fsdp", "tensor"]]]]
  assert sharding.specs(_abstract(a=(3, 8)), mesh, rules)["a"] == where.spec
  with pytest.raises(errors.UserError, match="6 is not a multiple of the 4"):
    sharding.specs(_abstract(a=(3, 6)), mesh, rules)


class _Device:
  """What `process_part` asks of a device."""

  def __init__(self, device, process_index):
    self.device, self.process_index = device, process_index


@pytest.mark.parametrize(
  ("axes", "expected"),
  [
    ({"data": 8}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ({"data": 2, "tensor": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ({"data": 2, "fsdp": 2, "tensor": 2}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ({"tensor": 8}, [(0, 1)] * 4),
    ({"data": 2, "context": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ({"fsdp": 2, "context": 2, "spatial": 2}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
  ],
)
def test_processes_read_what_their_devices_need(monkeypatch, axes, expected):
  """Four processes of two devices."""
  mesh = sharding.make_mesh(axes)
  owner = {device: i // 2 for i, device in enumerate(mesh.devices.flat)}
  indices = sharding.NamedSharding.devices_indices_map
  monkeypatch.setattr(
    sharding.NamedSharding,
    "devices_indices_map",
    lambda self, shape: {
      _Device(device, owner[device]): index
      for device, index in indices(self, shape).items()
    },
  )
  found = []
  for process in range(4):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    found.append(sharding.process_part(mesh))
  assert found == expected


def test_explicit_rules_that_do_not_fit_are_all_reported(mesh):
  state = _abstract(a=(6, 4), b=(8,), c=(8,), d=(8,))
  rules = [("a", ("fsdp", None)), ("b", (None, None)), ("c", ("model",))]
  rules.append(("d", "fsdp+experts"))
  with pytest.raises(errors.UserError) as e:
    sharding.specs(state, mesh, rules)
  for part in (
    "a (6, 4): 6 is not a multiple",
    "b (8,)",
    "'model' is no mesh",
    "'experts'",
  ):
    assert part in str(e.value)


def test_an_uncovered_leaf_is_an_error(mesh):
  with pytest.raises(errors.UserError, match="no rule covers b"):
    sharding.shardings(_abstract(a=(8,), b=(8,)), mesh, [("a", "fsdp")])


def test_shardings_place_arrays(mesh):
  where = sharding.shardings(_abstract(a=(8, 2)), mesh, [(".*", "fsdp")])
  a = jax.device_put(np.random.default_rng(0).random((8, 2)), where["a"])
  assert {shard.data.shape for shard in a.addressable_shards} == {(2, 2)}


def test_constrain_needs_no_mesh_and_uses_one(mesh):
  x = jnp.asarray(np.random.default_rng(0).random((8, 3)), jnp.float32)
  double = jax.jit(lambda x: sharding.constrain(2 * x, "batch"))
  assert double(x).sharding.is_fully_replicated
  with jax.set_mesh(mesh):
    y = double(x)
  assert {shard.data.shape for shard in y.addressable_shards} == {(1, 3)}
  np.testing.assert_array_equal(y, 2 * x)


@pytest.mark.parametrize("axes", [("words",), (None, "hidden")])
def test_constrain_refuses_unknown_names_and_remainders(axes):
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  with jax.set_mesh(mesh), pytest.raises(errors.UserError):
    sharding.constrain(jnp.zeros((6, 3)), *axes)
  assert sharding.constrain(jnp.zeros((6, 3)), *axes).shape == (6, 3)


def test_batch_tokens_and_columns_need_not_be_multiples():
  mesh = sharding.make_mesh({"data": 2, "context": 2, "spatial": 2})
  x = np.random.default_rng(0).normal(size=(1, 5, 3)).astype("f4")

  def totals(x, axis, *names):
    return jnp.cumsum(sharding.constrain(x, "batch", *names), axis)

  for axis, names in ((1, ["tokens"]), (2, [None, "columns"])):
    with jax.set_mesh(mesh):
      y = jax.jit(lambda x, a=axis, n=names: totals(x, a, *n))(x)
    np.testing.assert_allclose(y, np.cumsum(x, axis), rtol=1e-5, atol=1e-6)


def test_an_axis_that_a_mesh_lacks_counts_as_one():
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  where = sharding.activation_spec(mesh, "batch", "tokens", "hidden")
  assert where == P(("data",), None, None)
  assert sharding.num_shards(mesh, "heads") == 1
  with jax.set_mesh(mesh):
    assert sharding.constrain(jnp.zeros((2, 3)), "batch", "heads").shape == (
      2,
      3,
    )


def test_a_mesh_axis_is_used_once_per_array(mesh):
  rules = [("a", ("fsdp", "fsdp")), (".*", (("data", "fsdp"), "data"))]
  with pytest.raises(errors.UserError) as e:
    sharding.specs(_abstract(a=(8, 8), b=(8, 8)), mesh, rules)
  assert "a (8, 8)" in str(e.value) and "'fsdp' twice" in str(e.value)
  assert "b (8, 8)" in str(e.value) and "'data' twice" in str(e.value)
  with jax.set_mesh(mesh), pytest.raises(errors.UserError, match="'context'"):
    sharding.constrain(jnp.zeros((8, 8, 8)), "batch", "tokens", "heads")


def test_large_leaves_that_are_copied_are_said_once(mesh, recwarn):
  """Against their rule; of what a rule keeps whole nothing is said."""
  size = sharding._LARGE // 4
  state = _abstract(a=(5, size), b=(size + 1,), c=(size // 2,), d=(2 * size,))
  rules = [("a", ("context", "tensor?")), ("b", "fsdp"), (".*", "replicate")]
  for _ in range(2):
    assert {*sharding.specs(state, mesh, rules).values()} == {
      P("context", "tensor"),
      P(),
    }
  (warning,) = recwarn
  assert str(warning.message) == (
    "2 arrays, 0.4 GiB, lie whole on each of 8 devices, such as a (0.3 GiB): "
    "the mesh {'data': 2, 'fsdp': 4} does not split them by the rule "
    "('context', 'tensor?')"
  )


def test_what_is_split_and_one_device_need_no_word(mesh, recwarn):
  state = _abstract(a=(4, sharding._LARGE))
  sharding.specs(state, mesh, [("a", "fsdp")])
  alone = sharding.make_mesh({}, jax.devices()[:1])
  sharding.specs(state, alone, [("a", "fsdp")])
  sharding.specs(state, mesh, [("a", (None, None))])
  assert not recwarn.list
