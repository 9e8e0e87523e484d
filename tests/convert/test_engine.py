"""Rules: layouts, stacked layers, parts of fused weights, error messages."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.convert import engine, hosting, naming, reading
from dcvideogen_jax.convert.naming import COPY, DENSE, Layout, Rule

RULES = [
  Rule("layers.{i}.q.weight", "blocks/qkv/kernel", DENSE, True, (0, 3)),
  Rule("layers.{i}.k.weight", "blocks/qkv/kernel", DENSE, True, (1, 3)),
  Rule("layers.{i}.v.weight", "blocks/qkv/kernel", DENSE, True, (2, 3)),
  Rule("layers.{i}.norm.gamma", "blocks/scale", Layout(None, (1, 2)), True),
  Rule("tables.{s}.{j}.weight", "tables_{s}/j_{j}", COPY),
  Rule("cls", "cls", Layout(None, squeezed_axes=(0, 1))),
  Rule("conv", "conv", naming.CONV2D),
]
LAYERS = 3
SHAPES = {
  "blocks/qkv/kernel": (LAYERS, 5, 12),
  "blocks/scale": (LAYERS, 7),
  "tables_4/j_0": (2, 3),
  "cls": (6,),
  "conv": (3, 4, 5, 2),
}
TORCH = {
  **{f"layers.{i}.{x}.weight": (4, 5) for x in "qkv" for i in range(LAYERS)},
  **{f"layers.{i}.norm.gamma": (7, 1, 1) for i in range(LAYERS)},
  "tables.4.0.weight": (2, 3),
  "cls": (1, 1, 6),
  "conv": (2, 5, 3, 4),
}


def expected(dtype=jnp.float32):
  return {
    "blocks": {
      "qkv": {"kernel": leaf("blocks/qkv/kernel", dtype)},
      "scale": leaf("blocks/scale", dtype),
    },
    "tables_4": {"j_0": leaf("tables_4/j_0", dtype)},
    "cls": leaf("cls", dtype),
    "conv": leaf("conv", dtype),
  }


def numpy_arrays(rules, params):
  return {n: t.read() for n, t in engine.torch_tensors(rules, params).items()}


def leaf(name, dtype):
  return jax.ShapeDtypeStruct(SHAPES[name], dtype)


def arrays(dtype=np.float32):
  random = np.random.default_rng(0)
  return {n: random.normal(size=s).astype(dtype) for n, s in TORCH.items()}


def in_rows(array, log=None):
  """Returns a tensor that is read a few elements at a time."""
  flat = array.reshape(-1)

  def elements(start, stop, memory=None):
    if log is not None:
      log.append(stop - start)
    if memory is None:
      return flat[start:stop].copy()
    found = memory[: array.itemsize * (stop - start)].view(array.dtype)
    found[:] = flat[start:stop]
    return found

  return reading.tensor(array.shape, array.dtype, elements)


def whole(array):
  return reading.Tensor(array.shape, array.dtype, lambda: array)


def test_shapes_both_ways():
  assert naming.torch_shapes(RULES, expected()) == TORCH
  tensors = {name: whole(x) for name, x in arrays().items()}
  assert naming.jax_shapes(RULES, tensors) == SHAPES


@pytest.mark.parametrize("piece", [1, 64, 1 << 20])
@pytest.mark.parametrize("tensor", [whole, in_rows])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_values_and_way_back(monkeypatch, piece, tensor, dtype):
  monkeypatch.setattr(engine, "_PIECE", piece)
  values = arrays(dtype)
  params = engine.torch_to_jax(
    RULES, {n: tensor(x) for n, x in values.items()}, expected(dtype), "x"
  )
  qkv = np.asarray(params["blocks"]["qkv"]["kernel"])
  for i in range(LAYERS):
    for part, x in enumerate("qkv"):
      np.testing.assert_array_equal(
        qkv[i, :, 4 * part : 4 * part + 4], values[f"layers.{i}.{x}.weight"].T
      )
  np.testing.assert_array_equal(
    params["conv"], values["conv"].transpose(2, 3, 1, 0)
  )
  back = numpy_arrays(RULES, params)
  assert back.keys() == values.keys()
  for name, x in values.items():
    assert back[name].dtype == x.dtype
    np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_every_layer_has_to_be_there_once():
  tensors = {name: whole(x) for name, x in arrays().items()}
  del tensors["layers.1.k.weight"]
  tensors["layers.3.q.weight"] = tensors["layers.0.q.weight"]
  tensors["layers.01.q.weight"] = tensors["layers.0.q.weight"]
  with pytest.raises(errors.UserError) as e:
    engine.torch_to_jax(RULES, tensors, expected(), "the file")
  assert str(e.value) == (
    "the file does not fit (3 differences): missing layers.1.k.weight (4, 5); "
    "unexpected layers.3.q.weight, layers.01.q.weight (4, 5)"
  )


def test_hundreds_of_differences_are_grouped_and_counted():
  tensors = {f"other.{i}.w": whole(np.zeros(2)) for i in range(300)}
  tensors |= {
    f"odd{'abc'[i % 3]}{'x' * i}": whole(np.zeros(i)) for i in range(40)
  }
  with pytest.raises(errors.UserError) as e:
    engine.torch_to_jax(RULES, tensors, expected(), "the file")
  message = str(e.value)
  count = len(TORCH) + 300 + 40
  assert f"({count} differences)" in message
  assert "unexpected other.0.w ... other.299.w (300 names) (2,)" in message
  assert "unexpected 11 more" in message
  assert len(message) < 2500


def test_a_parameter_without_rule_is_named():
  with pytest.raises(errors.UserError, match="no rule converts cls"):
    engine.torch_tensors(RULES[:-2], {"cls": np.zeros(6)})


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("tensor", [whole, in_rows])
def test_nan_in_any_layer_is_named(tensor, value):
  values = arrays()
  values["layers.2.v.weight"][3, 4] = value
  tensors = {name: tensor(x) for name, x in values.items()}
  with pytest.raises(errors.UserError, match=r"layers\.2\.v\.weight holds NaN"):
    engine.torch_to_jax(RULES, tensors, expected(), "x")


# --- onto devices ------------------------------------------------------------


def shard(name, shape, mesh):
  """Splits the last axis that the devices along "fsdp" divide."""
  spec = [None] * len(shape)
  for axis, n in enumerate(shape):
    if n % mesh.shape["fsdp"] == 0:
      spec = [None] * len(shape)
      spec[axis] = "fsdp"
  return NamedSharding(mesh, P(*spec))


@pytest.mark.parametrize("tensor", [whole, in_rows])
def test_sharded_load_equals_the_plain_one(monkeypatch, tensor):
  monkeypatch.setattr(engine, "_PIECE", 32)
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  tensors = {name: tensor(x) for name, x in arrays().items()}
  plain = engine.torch_to_jax(RULES, tensors, expected(), "x")
  params = engine.torch_to_jax(
    RULES, tensors, expected(), "x", lambda n, s: shard(n, s, mesh)
  )
  kernel = params["blocks"]["qkv"]["kernel"]
  assert kernel.sharding.spec == P(None, None, "fsdp")
  assert {s.data.shape for s in kernel.addressable_shards} == {(LAYERS, 5, 6)}
  jax.tree.map(np.testing.assert_array_equal, plain, params)


def test_host_memory_is_for_the_shards_of_one_parameter_at_a_time(monkeypatch):
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8})
  live, peak, sizes = [0], [0], []
  shapes = {f"p{i}": (8, 16) for i in range(6)}
  rules = [Rule("t.{i}", "p{i}")]
  make = hosting.HostShards.__init__
  finish = hosting.HostShards.to_devices

  def counted(self, *args):
    make(self, *args)
    live[0] += 1
    peak[0] = max(peak[0], live[0])
    sizes.extend(b.nbytes for b in self._buffers.values())

  def finished(self):
    live[0] -= 1
    return finish(self)

  monkeypatch.setattr(hosting.HostShards, "__init__", counted)
  monkeypatch.setattr(hosting.HostShards, "to_devices", finished)
  values = {
    n.replace("p", "t."): np.random.default_rng(0).normal(size=s)
    for n, s in shapes.items()
  }
  params = engine.torch_to_jax(
    rules,
    {n: in_rows(x) for n, x in values.items()},
    {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()},
    "x",
    lambda n, s: NamedSharding(mesh, P("fsdp")),
  )
  assert peak[0] == 1
  assert sizes == [16 * 4] * 8 * len(shapes)
  np.testing.assert_array_equal(params["p5"], values["t.5"].astype(np.float32))


def test_rows_of_other_hosts_are_not_read(monkeypatch):
  monkeypatch.setattr(engine, "_PIECE", 1)
  read = []
  host = hosting.HostShards((8, 4), np.dtype(np.float32))
  host._buffers = {((2, 4), (0, 4)): np.zeros((2, 4), np.float32)}
  place = naming.TensorSlot("t", "p", None, Rule("t", "p"))
  values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
  tensor = in_rows(values, read)
  for rows in engine._pieces(tensor, place):
    engine._fill([host], "x", tensor, place, rows)
  assert read == [4, 4]
  (buffer,) = host._buffers.values()
  np.testing.assert_array_equal(buffer, values[2:4])


def test_a_loaded_parameter_is_the_buffer_that_was_filled():
  """On a CPU the parameter uses the filled buffer without a copy."""
  host = hosting.HostShards((300, 70), np.dtype(np.float32))
  values = np.random.default_rng(0).normal(size=(70, 300)).astype(np.float32)
  host.write(values.T, [(0, 300), (0, 70)])
  (buffer,) = host._buffers.values()
  array = host.to_devices()
  assert array.unsafe_buffer_pointer() == buffer.ctypes.data
  np.testing.assert_array_equal(array, values.T)
