"""What a run has made, written for PyTorch and read back bit by bit."""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, errors, tree
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.train import export
from tests.adapt import runs, tiny_models
from tests.train import finished

_WAN_VAE = {
  "latent_channels": 3,
  "base_width": 4,
  "multipliers": (1, 1),
  "blocks": 1,
  "temporal": (True,),
  "mean": (0.0,) * 3,
  "std": (1.0,) * 3,
}
_DC_AE_V = {
  "latent_channels": 4,
  "widths": (8, 8, 8, 8),
  "depths": (0, 1, 1, 1),
  "chunk_frames": 8,
  "spatial_factor": 4,
}
_ANEW = {"start": "random", "weights": None}
_CLIPS = {"source": "synthetic", "frames": 8, "height": 8, "width": 8}


def base(directory, name, **changes):
  """Random weights and the directory that they are in."""
  module = tiny_models.module(name, **changes)
  variables = tiny_models.variables(module)
  convert.save(directory, "wan_dit", module, variables, layout="diffusers")
  return str(directory), variables["params"]


def denoising(phase, kind="t2v", **start):
  """The config of a phase; from nothing unless told otherwise."""
  found = runs.config(phase, kind, lora={"rank": 3, "alpha": 5.0})
  found["model"] = found["model"] | {"rope_scale": (1, 2, 2)}
  return found | (runs.started(phase, **start) if start else {})


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
  """A run that trains everything, and what it has averaged."""
  workdir = tmp_path_factory.mktemp("scratch") / "run"
  return workdir, finished.write(workdir, denoising("scratch"))


class Adapted(NamedTuple):
  """A run of the third phase, written in every form.

  Attributes:
    workdir: the run.
    result: as it is loaded.
    base: what it started from, a directory.
    variables: all of its averaged variables.
    merged, half, lora: what was exported.
  """

  workdir: pathlib.Path
  result: export.Result
  base: str
  variables: Any
  merged: pathlib.Path
  half: pathlib.Path
  lora: pathlib.Path


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  path = tmp_path_factory.mktemp("adapted")
  source, params = base(path / "base", "deep_i2v", rope_scale=(1, 2, 2))
  config = denoising("lora", "i2v", weights=source)
  trained = finished.write(path / "run", config)
  variables = {**trained, "params": {**params, **trained["params"]}}
  result = export.load(path / "run")
  out = [path / form for form in ("merged", "half", "lora")]
  export.write(result, out[0])
  export.write(result, out[1], "bfloat16")
  export.write(result, out[2], format="lora")
  return Adapted(path / "run", result, source, variables, *out)


def merged(variables, alpha_over_rank=5 / 3):
  """By hand, in float64."""
  params = {
    n: np.float64(x) for n, x in tree.flatten(variables["params"]).items()
  }
  lora = tree.flatten(variables.get("lora", {}))
  for name, a in lora.items():
    module, _, factor = name.rpartition("/")
    if factor == "a":
      b = np.float64(lora[f"{module}/b"])
      params[f"{module}/kernel"] += alpha_over_rank * (np.float64(a) @ b)
  return params


def assert_equal(found, expected):
  found, expected = tree.flatten(found), tree.flatten(expected)
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype, name
    np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.parametrize("layout", [None, "original"])
def test_a_transformer_is_what_the_run_has_averaged(scratch, tmp_path, layout):
  workdir, variables = scratch
  assert (
    export.export(workdir, tmp_path / "out", layout=layout) == finished.STEP
  )
  module, found = convert.load("wan_dit", tmp_path / "out")
  config = denoising("scratch")
  assert module == wan_dit.build(config["model"])
  assert_equal(found["params"], variables["params"])


def test_what_was_frozen_is_the_base_s(tmp_path):
  source, params = base(tmp_path / "base", "base_t2v")
  trained = finished.write(tmp_path / "run", denoising("head", base=source))
  export.export(tmp_path / "run", tmp_path / "out")
  _, found = convert.load("wan_dit", tmp_path / "out")
  assert trained.keys() == {"params"}
  assert_equal(found["params"], {**params, **trained["params"]})


def test_low_rank_updates_are_merged_in_float32(adapted):
  module, found = convert.load("wan_dit", adapted.merged)
  assert module.lora_rank == 0
  for name, x in merged(adapted.variables).items():
    result = tree.flatten(found["params"])[name]
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, x, atol=1e-6, err_msg=name)
  # To the last bit what merging gives.
  assert_equal(found["params"], export.merged(adapted.result))


def test_frozen_weights_in_half_precision_are_no_obstacle(adapted):
  """The sum is rounded only when it is stored."""
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapted.result.params)
  found = export.merged(adapted.result._replace(params=params))
  expected = merged({**adapted.variables, "params": params})
  for name in ("blocks/ffn/linear_1/kernel", "time_proj/kernel"):
    np.testing.assert_allclose(
      tree.flatten(found)[name], expected[name], atol=1e-6
    )


def test_half_precision_spares_what_the_model_keeps(adapted):
  _, full = convert.load("wan_dit", adapted.merged)
  _, half = convert.load("wan_dit", adapted.half)
  full, half = (tree.flatten(x["params"]) for x in (full, half))
  assert half["blocks/modulation"].dtype == jnp.float32
  assert half["blocks/ffn/linear_1/kernel"].dtype == jnp.bfloat16
  for name, x in half.items():
    np.testing.assert_array_equal(x, full[name].astype(x.dtype), err_msg=name)


def test_low_rank_updates_and_ends_as_one_file(adapted):
  module, variables = convert.load("wan_dit", adapted.base)
  lora = convert.load_lora("wan_dit", adapted.lora, module)
  found = tree.flatten(convert.merge(variables["params"], lora))
  _, expected = convert.load("wan_dit", adapted.merged)
  for name, x in tree.flatten(expected["params"]).items():
    np.testing.assert_allclose(found[name], x, atol=1e-6, err_msg=name)
  part = convert.load_part("wan_dit", adapted.lora, module)
  assert [*part] == ["head", "head_modulation", "patch_embed"]
  assert_equal(part, {k: adapted.variables["params"][k] for k in part})
  described = json.loads((adapted.lora / "adapter_config.json").read_text())
  assert described["modules_to_save"] == ["patch_embedding", "proj_out"]
  assert (described["r"], described["lora_alpha"]) == (3, 5)
  assert described["base_model_name_or_path"] == adapted.base


@pytest.mark.parity
def test_diffusers_and_peft_open_it(adapted):
  import diffusers
  import peft

  opened = diffusers.WanTransformer3DModel.from_pretrained
  model = peft.PeftModel.from_pretrained(
    opened(adapted.base), str(adapted.lora)
  )
  apart = model.merge_and_unload().state_dict()
  whole = opened(adapted.merged).state_dict()
  leaves = {n: jnp.float32(x) for n, x in merged(adapted.variables).items()}
  params = flax.traverse_util.unflatten_dict(leaves, sep="/")
  module, _ = convert.load("wan_dit", adapted.merged)
  expected = convert.to_torch("wan_dit", module, {"params": params})
  assert apart.keys() == whole.keys() == expected.keys()
  for key, x in expected.items():
    np.testing.assert_allclose(whole[key], x, atol=1e-6, err_msg=key)
    np.testing.assert_allclose(apart[key], x, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("ema", [True, False])
def test_an_alignment_gives_its_patch_embedding(tmp_path, ema):
  config = denoising("embed", "i2v")
  if not ema:
    config["ema"] = None
  variables = finished.write(tmp_path / "run", config)
  export.export(tmp_path / "run", tmp_path / "out")
  (path,) = (tmp_path / "out").iterdir()
  names = ("0.patch_embedding.bias", "0.patch_embedding.weight")
  tensors = safetensors.numpy.load_file(path)
  assert sorted(tensors) == sorted(names)
  assert tensors[names[1]].shape == (16, 16, 1, 1, 1)
  for source in (path, tmp_path / "out"):
    found = convert.load_part("wan_dit", source, tiny_models.module("deep_i2v"))
    assert_equal(found, variables["params"])


def test_wan_s_autoencoder_with_what_was_measured(tmp_path):
  config = {"task": "wan_autoencoder", "model": _WAN_VAE, "data": _CLIPS}
  config |= {"loss": {"l1": 1.0, "kl": 0.1}, **_ANEW}
  variables = finished.write(tmp_path / "run", config)
  measured = {"mean": [0.5, -0.25, 1.0], "std": [2.0, 1.5, 0.5]}
  export.export(tmp_path / "run", tmp_path / "out", fields=measured)
  module, found = convert.load("wan_vae", tmp_path / "out")
  assert module.mean == (0.5, -0.25, 1.0) and module.std == (2.0, 1.5, 0.5)
  assert_equal(found["params"], variables)
  wrong = {"mean": [0.5, -0.25]}
  with pytest.raises(errors.UserError, match="fields: "):
    export.export(tmp_path / "run", tmp_path / "b", fields=wrong)
  with pytest.raises(errors.UserError, match="mean, std, found latent_scale"):
    export.export(tmp_path / "run", tmp_path / "b", fields={"latent_scale": 1})
  assert not (tmp_path / "b").exists()


def test_dc_ae_v_with_its_scale(tmp_path):
  config = {"task": "autoencoder", "model": _DC_AE_V, "data": _CLIPS}
  config |= {"loss": {"l1": 1.0}, **_ANEW}
  variables = finished.write(tmp_path / "run", config)
  fields = {"latent_scale": 0.75}
  for dtype, stored in ((None, jnp.bfloat16), ("float32", jnp.float32)):
    out = tmp_path / stored.__name__
    export.export(tmp_path / "run", out, dtype, fields=fields)
    module, found = convert.load("dc_ae_v", out)
    assert module.latent_scale == 0.75
    expected = {n: x.astype(stored) for n, x in tree.flatten(variables).items()}
    assert_equal(found["params"], expected)


def test_encoders_of_raw_video_are_not_needed(scratch, tmp_path):
  workdir, _ = scratch
  shutil.copytree(workdir, tmp_path / "run")
  path = tmp_path / "run" / "config.json"
  config = json.loads(path.read_text())
  config["encoders"] = {"text": {"path": "/gone", "dtype": "float32"}}
  path.write_text(json.dumps(config))
  assert export.load(tmp_path / "run").step == finished.STEP


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"format": "lora"}, "a run of scratch has no low-rank updates"),
    ({"format": "onnx"}, "format must be one of merged, lora, found 'onnx'"),
    ({"dtype": "int8"}, "dtype must be one of float32, bfloat16"),
    ({"layout": "keras"}, "unknown layout 'keras' of wan_dit"),
    ({"fields": {"heads": 4}}, "of wan_dit that can be given are none"),
  ],
)
def test_refusals(scratch, tmp_path, options, message):
  with pytest.raises(errors.UserError, match=message):
    export.export(scratch[0], tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


def test_runs_that_are_none(tmp_path):
  with pytest.raises(errors.UserError, match="holds no run"):
    export.load(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"task": "dance"}))
  with pytest.raises(errors.UserError, match="'dance' cannot be exported"):
    export.load(tmp_path)
  config = finished.COMMON | denoising("scratch")
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match="holds no checkpoint yet"):
    export.load(tmp_path)


@pytest.mark.parametrize(
  ("keys", "value"),
  [
    ([], "["),
    ([], -0.5),
    ([], ["["] * 3),
    (["task"], []),
    (["phase"], None),
    (["steps"], -1),
    (["optim"], {}),
    (["optim", "betas"], 3),
    (["ema", "steps"], "few"),
    (["start"], "../../out"),
    (["model", "text_width"], 0.5),
    (["model", "layers"], [None]),
    (["model", "patch"], [1, 1]),
  ],
)
def test_configs_that_no_run_has(scratch, tmp_path, keys, value):
  config = holder = json.loads((scratch[0] / "config.json").read_text())
  for key in keys[:-1]:
    holder = holder[key]
  if keys:
    holder[keys[-1]] = value
  path = tmp_path / "config.json"
  path.write_text(json.dumps(config if keys else value))
  with pytest.raises(errors.UserError, match=str(path)):
    export.load(tmp_path)
  path.write_text("[" * 100_000)
  with pytest.raises(errors.UserError, match="nested too deep"):
    export.load(tmp_path)


def test_weights_that_a_run_started_from_are_needed(adapted, tmp_path):
  shutil.copytree(adapted.workdir, tmp_path / "run")
  path = tmp_path / "run" / "config.json"
  path.write_text(path.read_text().replace(adapted.base, "/gone"))
  with pytest.raises(errors.UserError, match="there is no .*/gone"):
    export.export(tmp_path / "run", tmp_path / "out")
