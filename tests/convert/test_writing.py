"""Directories are written completely, in the names of each library."""

import functools
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, errors
from tests.convert import checkpoints

LAYOUTS = ("diffusers", "original")


def loaded(name="t2v"):
  return convert.load(
    "wan_dit", checkpoints.random_weights(name), checkpoints.MODELS[name]
  )


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("shard_size", [None, 3000])
def test_written_directories_are_read_again(tmp_path, layout, shard_size):
  module, variables = loaded("t2v" if layout == "original" else "flf2v")
  written = convert.save(
    tmp_path / "a",
    "wan_dit",
    module,
    variables,
    layout=layout,
    shard_size=shard_size,
  )
  assert sorted(written) == sorted((tmp_path / "a").iterdir())
  stem = "model" if layout is None else "diffusion_pytorch_model"
  files = sorted(p.name for p in written if p.suffix == ".safetensors")
  if shard_size is None:
    assert files == [f"{stem}.safetensors"]
  else:
    assert len(files) > 3
    assert files[1] == f"{stem}-00002-of-{len(files):05d}.safetensors"
    assert written[-2].name == f"{stem}.safetensors.index.json"
  again, found = convert.load("wan_dit", tmp_path / "a")
  assert again == module
  jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_files_are_what_the_safetensors_library_reads(tmp_path):
  expected = checkpoints.mixed_dtypes()
  module, variables = convert.load(
    "wan_dit", expected, checkpoints.MODELS["t2v"]
  )
  convert.save(tmp_path, "wan_dit", module, variables, layout="diffusers")
  path = tmp_path / "diffusion_pytorch_model.safetensors"
  checkpoints.assert_same(safetensors.numpy.load_file(path), expected)
  with safetensors.safe_open(path, "numpy") as file:
    assert file.metadata() == {"format": "pt"}


def test_other_weights_are_not_mixed_with(tmp_path):
  module, variables = loaded()
  save = functools.partial(
    convert.save, tmp_path, "wan_dit", module, variables, layout="diffusers"
  )
  save(shard_size=3000)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(errors.UserError, match="holds other weights already"):
    save()
  assert sorted(tmp_path.iterdir()) == before
  save(shard_size=3000)


def test_nothing_is_left_of_a_failed_directory(tmp_path, monkeypatch):
  module, variables = loaded()
  convert.save(tmp_path, "wan_dit", module, variables, shard_size=3000)
  before = {path: path.read_bytes() for path in tmp_path.iterdir()}
  opened = pathlib.Path.open

  def failing(self, mode="r", *args, **kwargs):
    if "w" in mode and "-00003-of" in self.name:
      raise OSError(28, "No space left on device")
    return opened(self, mode, *args, **kwargs)

  monkeypatch.setattr(pathlib.Path, "open", failing)
  half = jax.tree.map(lambda x: x / 2, variables)
  with pytest.raises(errors.UserError, match="No space left on device"):
    convert.save(tmp_path, "wan_dit", module, half, shard_size=3000)
  monkeypatch.undo()
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_original_code_knows_one_clip(tmp_path):
  module, variables = loaded("i2v")
  with pytest.raises(errors.UserError, match=r"1280 channels.*\(10, None\)"):
    convert.save(
      tmp_path / "a", "wan_dit", module, variables, layout="original"
    )
  assert not (tmp_path / "a").exists()


def test_unknown_layouts():
  with pytest.raises(errors.UserError, match="unknown layout 'keras'"):
    convert.to_torch("wan_dit", *loaded(), "keras")


@pytest.mark.parametrize(
  ("value", "dtype"),
  [(np.nan, None), (np.inf, None), (1e30, np.float16), (3.4e38, "bfloat16")],
)
def test_nothing_that_is_not_finite_is_written(tmp_path, value, dtype):
  """Neither NaN of a training, nor values that a smaller dtype cannot hold."""
  module, variables = loaded()
  bias = variables["params"]["head"]["bias"]
  variables["params"]["head"]["bias"] = bias.at[1].set(value)
  save = functools.partial(
    convert.save, tmp_path, "wan_dit", module, variables, dtype
  )
  with pytest.raises(
    errors.UserError, match=r"proj_out\.bias holds NaN, infini"
  ):
    save()
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  ("stored", "value", "dtype"),
  [
    (np.float64, 1e300, None),
    (np.float32, 1e5, np.float16),
    (np.float32, 3.4e38, "bfloat16"),
  ],
)
def test_what_the_dtype_asked_for_cannot_hold(stored, value, dtype):
  """Without the error these values would silently become infinity."""
  weights = {
    name: x.astype(stored) for name, x in checkpoints.random_weights().items()
  }
  weights["blocks.0.attn1.to_q.bias"][1] = value
  told = "blocks.0.attn1.to_q.bias holds values that .*float.* cannot hold"
  with pytest.raises(errors.UserError, match=told):
    convert.load("wan_dit", weights, checkpoints.MODELS["t2v"], dtype)
