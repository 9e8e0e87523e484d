"""Weights are rounded to eight bits once, saved, and loaded as they are."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import config_parts, convert, errors, sharding, tree
from dcvideogen_jax.convert import (
  engine,
  matching,
  naming,
  quantised_tensors,
  reading,
  rounding,
)
from dcvideogen_jax.models import eight_bits
from tests.sample import published

FORMATS = [*eight_bits.FORMATS]
MODELS = [("wan_dit", "dc_t2v"), ("umt5", None)]


def _bits(variables):
  return {
    name: np.asarray(leaf).view(np.uint8)
    for name, leaf in tree.flatten(variables).items()
  }


def _require_same(found, expected):
  assert found.keys() == expected.keys()
  for name, bits in found.items():
    np.testing.assert_array_equal(bits, expected[name], err_msg=name)


@pytest.fixture(scope="module", params=MODELS, ids=lambda x: x[0])
def saved(request, tmp_path_factory):
  """A model, and the directory that it is saved in."""
  model = published.model(*request.param)
  directory = tmp_path_factory.mktemp(model.kind)
  convert.save(directory, *model)
  return model, directory


@pytest.mark.parametrize("name", FORMATS)
def test_rounded_when_read_saved_and_loaded(saved, tmp_path, name):
  (kind, _, variables), directory = saved
  module, found = convert.load(kind, directory, weights=name)
  assert module.weights == name
  plain, leaves = tree.flatten(variables), tree.flatten(found)
  for path, leaf in plain.items():
    if "/blocks/" not in path or not path.endswith("/kernel"):
      np.testing.assert_array_equal(leaves[path], leaf)
      continue
    scale = leaves[path.removesuffix("kernel") + "scale"]
    for i in range(len(leaf)):
      expected = eight_bits.quantise(np.asarray(leaf[i]), name)
      np.testing.assert_array_equal(leaves[path][i], expected[0])
      np.testing.assert_array_equal(scale[i], expected[1])
  convert.save(tmp_path / "rounded", kind, module, found)
  for weights in (None, name):
    again, same = convert.load(kind, tmp_path / "rounded", weights=weights)
    assert again == module
    _require_same(_bits(same), _bits(found))
  other = next(x for x in rounding.WEIGHTS if x != name)
  with pytest.raises(errors.UserError, match=f"are in {name}, expected the"):
    convert.load(kind, tmp_path / "rounded", weights=other)


def test_rounding_in_memory_is_rounding_when_read(saved, monkeypatch):
  (kind, module, variables), directory = saved
  _, expected = convert.in_eight_bits(kind, module, variables, "int8")
  monkeypatch.setattr(engine, "_PIECE", 200)  # Several pieces of a kernel.
  _, found = convert.load(kind, directory, weights="int8")
  _require_same(_bits(found), _bits(expected))


@pytest.mark.parametrize("saved", MODELS[:1], indirect=True)
def test_kernels_and_scales_are_sharded_as_they_are_read(saved):
  (kind, *_), directory = saved
  mesh = sharding.make_mesh({"tensor": 2, "fsdp": 2}, jax.devices()[:4])
  rules = config_parts.dit_sharding("fsdp")

  def where(abstract):
    return sharding.shardings(abstract, mesh, rules)

  _, expected = convert.load(kind, directory, weights="int8")
  _, found = convert.load(kind, directory, weights="int8", sharding=where)
  _require_same(_bits(found), _bits(expected))
  blocks = found["params"]["blocks"]["ffn"]
  specs = {
    name: blocks[layer][name].sharding.spec
    for layer, name in (("linear_1", "kernel"), ("linear_1", "scale"))
  }
  assert specs == {
    "kernel": P(None, "fsdp", "tensor"),
    "scale": P(None, "tensor"),
  }
  assert blocks["linear_2"]["scale"].sharding.spec == P(None, "fsdp")


def test_what_is_not_needed_is_left_out(tmp_path):
  kind, module, variables = published.model("dc_ae_v")
  convert.save(tmp_path, kind, module, variables)
  _, found = convert.load(
    kind, tmp_path, only=lambda name: name.startswith("decoder/")
  )
  decoder = variables["params"]["decoder"]
  _require_same(_bits(found), _bits({"params": {"decoder": decoder}}))


def test_casts_to_float8_are_used_as_they_are(saved):
  (kind, module, variables), _ = saved
  tensors = convert.to_torch(kind, module, variables)
  fields = convert.api.config_of(module)
  cast = {n: x.astype(eight_bits.FORMATS["float8"]) for n, x in tensors.items()}
  _, plain = convert.load(kind, cast, fields, np.float32)
  _, found = convert.load(kind, cast, fields, np.float32, weights="float8")
  plain, found = tree.flatten(plain), tree.flatten(found)
  for name in plain:
    np.testing.assert_array_equal(found[name].astype(np.float32), plain[name])
  assert all((found[n] == 1).all() for n in found.keys() - plain.keys())


def test_integers_without_scales_are_refused(saved):
  (kind, module, variables), _ = saved
  tensors = convert.to_torch(kind, module, variables)
  name = next(n for n in tensors if ".0." in n and tensors[n].ndim == 2)
  tensors[name] = np.ones(tensors[name].shape, np.int8)
  fields = convert.api.config_of(module)
  with pytest.raises(errors.UserError, match=f"{name} holds int8, quantised"):
    convert.load(kind, tensors, fields, weights="int8")


@pytest.mark.parametrize("wrong", ["int4", 8, ["int8"]])
def test_a_config_with_other_weights_is_refused(saved, tmp_path, wrong):
  (kind, *_), directory = saved
  for path in directory.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  config = json.loads((directory / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"weights": wrong}))
  with pytest.raises(
    errors.UserError, match='"weights" in config.json must be'
  ):
    convert.load(kind, tmp_path)


def test_eight_bits_are_written_for_the_programs_here_alone(saved, tmp_path):
  (kind, *_), directory = saved
  made = kind, *convert.load(kind, directory, weights="int8")
  for options in ({"layout": "original"}, {"dtype": "bfloat16"}):
    with pytest.raises(errors.UserError, match="in int8 are only written as"):
      convert.save(tmp_path / "new", *made, **options)
  with pytest.raises(errors.UserError, match="in int8 are only written as"):
    convert.write_file(tmp_path / "new.safetensors", *made)
  assert not [*tmp_path.iterdir()]


def test_other_models_have_no_eight_bits(tmp_path):
  convert.save(tmp_path, *published.model("dc_ae_v"))
  with pytest.raises(
    errors.UserError, match="a dc_ae_v has no weights in int8"
  ):
    convert.load("dc_ae_v", tmp_path, weights="int8")


def test_nothing_is_added_to_rounded_kernels(saved):
  (kind, _, _), directory = saved
  _, found = convert.load(kind, directory, weights="int8")
  name = next(n for n in tree.flatten(found["params"]) if n.endswith("/kernel"))
  delta = np.ones(tree.shapes(found["params"])[name], np.float32)
  for lora in (
    convert.Lora({}, {name: delta}, 1),
    convert.Lora({}, {}, 1, changes={name: []}),
  ):
    with pytest.raises(errors.UserError, match="is in int8, to which nothing"):
      convert.merge(found["params"], lora)


def _stored(values, scales, block):
  def rows(start, stop):
    return quantised_tensors.Quantised(values, scales, block).take(start, stop)

  return reading.dequantised(
    values.shape,
    quantised_tensors.Stored("int8 of a file", values.dtype, block, rows),
  )


@pytest.mark.parametrize("scaled", ["rows", "tensor", "half rows"])
def test_numbers_of_a_file_are_used_if_their_scales_are_of_rows(saved, scaled):
  (kind, module, variables), _ = saved
  random = np.random.default_rng(0)
  tensors = convert.to_tensors(kind, module, variables)
  end = "ffn.net.0.proj.weight" if kind == "wan_dit" else "wi_0.weight"
  name = next(n for n in tensors if n.endswith(end))
  height, width = tensors[name].shape
  blocks = {"rows": (1, width), "tensor": (height, width)}
  block = blocks.get(scaled, (1, width // 2))
  values = random.integers(-100, 101, (height, width), np.int8)
  scales = random.uniform(0.01, 0.1, (height // block[0], width // block[1]))
  tensors[name] = _stored(values, scales.astype(np.float32), block)
  rules = convert.api.rules_of(kind, None)
  module = rounding.with_weights(kind, module, "int8")
  expected = matching.parameters(kind, module)
  if scaled == "half rows":
    with pytest.warns(UserWarning, match="int8 of a file are rounded again"):
      engine.torch_to_jax(rules, tensors, expected, kind)
    return
  leaves = tree.flatten(engine.torch_to_jax(rules, tensors, expected, kind))
  places = naming.places(rules, tree.shapes(variables["params"]))
  slot = next(place for place in places if place.torch == name)
  np.testing.assert_array_equal(leaves[slot.jax][slot.layer].T, values)
  scale = leaves[slot.jax.removesuffix("kernel") + "scale"][slot.layer]
  wanted = np.repeat(scales[:, 0], block[0]).astype(np.float32)
  np.testing.assert_array_equal(scale, wanted)
