"""Weights survive every way there and back, bit for bit."""

import json
import os
import stat

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert
from tests.launch import launching


def run(programs, source, output, *flags, **limits):
  finished = programs.run(
    "launch.convert",
    f"--source={source}",
    f"--output={output}",
    *flags,
    **limits,
  )
  assert finished.code == 0, finished.stderr
  assert finished.stderr == ""
  return finished.stdout


def state_dict(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


def require_equal(found, expected):
  assert found.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert found[name].dtype == expected[name].dtype, name


def test_directory_to_file_and_back(programs, model, tmp_path):
  file, again = tmp_path / "a" / "w.safetensors", tmp_path / "again"
  told = run(programs, model[0], file, "--to=torch")
  assert "60 parameters" not in told
  expected = state_dict(model[0])
  count = sum(x.size for x in expected.values())
  assert f"{len(expected)} tensors, {count:,} parameters, float32" in told
  assert f"wrote {file}" in told
  require_equal(safetensors.numpy.load_file(file), expected)

  config = tmp_path / "config.json"
  config.write_text(json.dumps(launching.CONFIG))
  run(programs, file, again, f"--config={config}", "--to=jax")
  require_equal(state_dict(again), expected)
  assert json.loads((again / "config.json").read_text()) == json.loads(
    (model[0] / "config.json").read_text()
  )
  module, _ = convert.load("dc_ae_v", again)
  assert module == model[1]


def test_dtype(programs, model, tmp_path):
  told = run(programs, model[0], tmp_path / "half", "--dtype=bfloat16")
  assert "bfloat16" in told
  expected = {
    name: x.astype(jnp.bfloat16) for name, x in state_dict(model[0]).items()
  }
  require_equal(state_dict(tmp_path / "half"), expected)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pt_is_what_torch_and_the_official_code_read(
  programs, model, tmp_path, dtype
):
  torch = pytest.importorskip("torch")
  file = tmp_path / "w.pt"
  run(programs, model[0], file, f"--dtype={dtype}")
  # The official code reads one or the other, depending on its settings.
  loaded = torch.load(file, weights_only=True)
  (averaged,) = loaded["ema_model_state_dict"].values()
  expected = {name: x.astype(dtype) for name, x in state_dict(model[0]).items()}
  for found in (averaged, loaded["model_state_dict"]):
    assert {str(x.dtype) for x in found.values()} == {f"torch.{dtype}"}
    require_equal(
      {name: x.float().numpy() for name, x in found.items()},
      {name: x.astype(np.float32) for name, x in expected.items()},
    )
  size = sum(x.nbytes for x in expected.values())
  assert file.stat().st_size < 1.5 * size, "the tensors are stored once"

  run(
    programs,
    file,
    tmp_path / "back",
    f"--config={json.dumps(launching.CONFIG)}",
  )
  require_equal(state_dict(tmp_path / "back"), expected)


def test_pt_without_torch(programs, model, tmp_path):
  finished = programs.run(
    "launch.convert",
    f"--source={model[0]}",
    f"--output={tmp_path / 'a' / 'w.pt'}",
    without=("torch",),
  )
  assert finished.code == 2
  (line,) = finished.stderr.splitlines()
  assert "pip install torch" in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("to", "output", "word"),
  [
    ("jax", "w.pt", "names a file"),
    ("jax", "w.safetensors", "names a file"),
    ("torch", "w", ".safetensors"),
  ],
)
def test_target_and_name_disagree(programs, model, tmp_path, to, output, word):
  finished = programs.run(
    "launch.convert",
    f"--source={model[0]}",
    f"--output={tmp_path / output}",
    f"--to={to}",
  )
  assert finished.code == 2
  assert word in finished.stderr
  assert not list(tmp_path.iterdir())


def test_other_users_may_read_the_result(programs, model, tmp_path):
  umask = os.umask(0o022)
  os.umask(umask)
  run(programs, model[0], tmp_path / "w.safetensors")
  mode = stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode)
  assert mode == 0o666 & ~umask


@pytest.mark.parametrize(
  ("name", "fields"),
  [("f32t4c128", {}), ("own configuration", {"time": "causal"})],
)
def test_a_released_variant_has_a_name(name, fields):
  from launch import _model

  variants = convert.KINDS["dc_ae_v"].variants
  module = convert.KINDS["dc_ae_v"].build({**variants["f32t4c128"], **fields})
  assert _model.variant("dc_ae_v", module) == name
