"""Weights in every form that the official code writes, both ways, strictly."""

import collections
import json
import pickle
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, errors, files
from dcvideogen_jax.convert import matching, sources
from dcvideogen_jax.models import dc_ae_v
from tests import golden_data
from tests.convert import checkpoints

NAME = "f32t4_chunk8"
CONFIG = golden_data.DC_AE_V[NAME]


def weights():
  return dict(golden_data.weights("dc_ae_v", NAME))


@pytest.mark.parametrize("name", ["f32t4_chunk8", "f64t4_chunk8"])
def test_round_trip_is_bit_exact(name):
  expected = golden_data.weights("dc_ae_v", name)
  loaded = convert.load("dc_ae_v", expected, golden_data.DC_AE_V[name])
  checkpoints.assert_same(convert.to_torch("dc_ae_v", *loaded), expected)


def test_round_trip_keeps_bfloat16(tmp_path):
  expected = {k: x.astype(ml_dtypes.bfloat16) for k, x in weights().items()}
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(expected, path)
  module, variables = convert.load("dc_ae_v", path, CONFIG)
  assert module.param_dtype == jnp.bfloat16 and module.dtype == jnp.float32
  checkpoints.assert_same(
    convert.to_torch("dc_ae_v", module, variables), expected
  )


def test_dtype_is_that_of_parameters_and_computation():
  module, variables = convert.load("dc_ae_v", weights(), CONFIG, jnp.bfloat16)
  dtypes = {x.dtype for x in jax.tree.leaves(variables)}
  assert dtypes == {np.dtype(jnp.bfloat16)}
  assert module.dtype == jnp.bfloat16 and module.param_dtype == jnp.bfloat16


def test_saved_directory_needs_no_config(tmp_path):
  loaded = convert.load("dc_ae_v", weights(), CONFIG)
  convert.save(tmp_path / "model", "dc_ae_v", *loaded)
  module, variables = convert.load("dc_ae_v", tmp_path / "model")
  assert module == loaded[0]
  checkpoints.assert_same(
    convert.to_torch("dc_ae_v", module, variables), weights()
  )
  assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
    "config.json",
    "model.safetensors",
  ]


# --- official .pt files ------------------------------------------------------


def torch_save(value, path):
  import torch

  def tensors(x):
    if isinstance(x, dict):
      return {k: tensors(v) for k, v in x.items()}
    if x.dtype == ml_dtypes.bfloat16:
      return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())

  torch.save(tensors(value), path)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
  "layout",
  [
    lambda w: {"ema_model_state_dict": {"0.99": w}, "model_state_dict": {}},
    lambda w: {"model_state_dict": w},
    lambda w: w,
  ],
  ids=["ema", "model", "flat"],
)
def test_official_pt_layouts(tmp_path, layout, dtype):
  expected = {name: x.astype(dtype) for name, x in weights().items()}
  torch_save(layout(expected), tmp_path / "x.pt")
  loaded = convert.load("dc_ae_v", tmp_path / "x.pt", CONFIG)
  checkpoints.assert_same(convert.to_torch("dc_ae_v", *loaded), expected)


@pytest.mark.parity
def test_pt_with_views_and_parameters(tmp_path):
  import torch

  expected = weights()
  state = collections.OrderedDict()
  for i, (name, x) in enumerate(expected.items()):
    tensor = torch.from_numpy(x.copy())
    if i % 3 == 0:  # A view into a larger storage, not contiguous.
      wide = torch.stack([tensor, tensor + 1], dim=-1)
      tensor = wide[..., 0]
    state[name] = torch.nn.Parameter(tensor) if i % 3 == 1 else tensor
  torch.save(state, tmp_path / "x.pt")
  loaded = convert.load("dc_ae_v", tmp_path / "x.pt", CONFIG)
  checkpoints.assert_same(convert.to_torch("dc_ae_v", *loaded), expected)


class _Opens:
  """Pickles to a call that makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), "w"))


def zipped(path, pickled):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", pickled)
    archive.writestr("x/byteorder", "little")
  return path


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
  target = tmp_path / "made"
  pickled = pickle.dumps({"model_state_dict": _Opens(target)}, protocol=2)
  path = zipped(tmp_path / "x.pt", pickled)
  with pytest.raises(errors.UserError, match=r"refused.*io\.open"):
    convert.load("dc_ae_v", path, CONFIG)
  assert not target.exists()


def test_pickle_is_never_loaded_bare(tmp_path):
  target = tmp_path / "made"
  (tmp_path / "x.pt").write_bytes(pickle.dumps(_Opens(target)))
  with pytest.raises(errors.UserError, match="not a PyTorch checkpoint"):
    convert.load("dc_ae_v", tmp_path / "x.pt", CONFIG)
  assert not target.exists()


# --- damage and mistakes -----------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_safetensors(tmp_path, keep):
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(weights(), path)
  data = path.read_bytes()
  path.write_bytes(data[: keep if keep >= 1 else int(keep * len(data))])
  with pytest.raises(errors.UserError, match="safetensors"):
    convert.load("dc_ae_v", path, CONFIG)


@pytest.mark.parity
@pytest.mark.parametrize("keep", [0, 0.3, 0.999])
def test_truncated_pt(tmp_path, keep):
  path = tmp_path / "x.pt"
  torch_save(weights(), path)
  data = path.read_bytes()
  path.write_bytes(data[: int(keep * len(data))])
  with pytest.raises(errors.UserError, match="truncated"):
    convert.load("dc_ae_v", path, CONFIG)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(value, dtype):
  broken = {name: x.astype(dtype) for name, x in weights().items()}
  name = "decoder.project_in.conv.bias"
  broken[name] = broken[name].copy()
  broken[name][1] = value
  with pytest.raises(errors.UserError, match=f"{name}.*NaN or infinity"):
    convert.load("dc_ae_v", broken, CONFIG)


def test_every_difference_is_listed_at_once():
  broken = weights()
  del broken["encoder.project_out.conv.bias"]
  broken["encoder.extra"] = np.zeros(3, np.float32)
  name = "decoder.project_in.conv.weight"
  broken[name] = broken[name][:, :4]
  with pytest.raises(errors.UserError) as e:
    convert.load("dc_ae_v", broken, CONFIG)
  message = str(e.value)
  assert "(3 differences)" in message
  assert "missing encoder.project_out.conv.bias (8,)" in message
  assert "unexpected encoder.extra (3,)" in message
  assert "shape of decoder.project_in.conv.weight: expected" in message


def test_released_variant_is_recognised_from_names_and_shapes():
  """On shapes alone: the weights themselves would take 8.6 GB."""
  for variant, fields in dc_ae_v.VARIANTS.items():
    tensors = {
      name: sources.Tensor(shape, np.dtype(np.float32), lambda: None)
      for name, shape in checkpoints.shapes(
        "dc_ae_v", fields, "official"
      ).items()
    }
    found = matching.find_config("dc_ae_v", {}, None, tensors)
    assert found == dc_ae_v.VARIANTS[variant]


def test_unknown_model_needs_a_config():
  with pytest.raises(errors.UserError, match="config is needed"):
    convert.load("dc_ae_v", weights())


@pytest.mark.parametrize(
  ("source", "config", "message"),
  [
    ("nowhere", None, "no file or directory"),
    ("empty", None, "holds no checkpoint"),
    ("notes.txt", None, "not a checkpoint"),
    (None, "f32t4c32", "does not fit"),
    (None, "f32t4c33", "unknown variant"),
    (None, {**CONFIG, "chunk": 3}, "unknown fields"),
    (None, {"widths": (1,)}, "missing fields"),
  ],
)
def test_wrong_arguments(tmp_path, source, config, message):
  (tmp_path / "empty").mkdir()
  (tmp_path / "notes.txt").write_text("hello")
  source = tmp_path / source if source else weights()
  with pytest.raises(errors.UserError, match=message):
    convert.load("dc_ae_v", source, config)


def test_config_of_another_kind(tmp_path):
  loaded = convert.load("dc_ae_v", weights(), CONFIG)
  convert.save(tmp_path, "dc_ae_v", *loaded)
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "dit"}))
  with pytest.raises(errors.UserError, match="of a dit"):
    convert.load("dc_ae_v", tmp_path)


def test_to_torch_refuses_other_parameters():
  module, variables = convert.load("dc_ae_v", weights(), CONFIG)
  del variables["params"]["encoder"]["project_out"]["bias"]
  with pytest.raises(errors.UserError, match="missing"):
    convert.to_torch("dc_ae_v", module, variables)


def test_atomic_leaves_nothing_behind(tmp_path):
  path = tmp_path / "x.json"
  path.write_text("before")
  with pytest.raises(RuntimeError), files.atomic(path) as temporary:
    temporary.write_text("half")
    raise RuntimeError
  assert path.read_text() == "before"
  assert list(tmp_path.iterdir()) == [path]


def test_atomic_says_what_could_not_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(errors.UserError, match="cannot write"),
    files.atomic(tmp_path / "file" / "x.json"),
  ):
    pass
