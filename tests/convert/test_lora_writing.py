"""Trained updates as one file, which PEFT and this project read back."""

import functools
import json
import warnings

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, errors, tree
from tests import random_weights
from tests.convert import checkpoints

ALPHA, RANK = 6.0, 3
# Parameters that the third phase trains fully.
WHOLE = ("patch_embed/kernel", "patch_embed/bias", "head/kernel", "head/bias")
WHOLE = (*WHOLE, "head_modulation")


@functools.cache
def trained(name="i2v"):
  """Returns a base, and changes as a run makes them.

  The changes are random low-rank factors, and new patch embedding and head.
  """
  fields = checkpoints.MODELS[name] | {"patch": (1, 1, 1)}
  weights = checkpoints.state_dict("wan_dit", fields, "diffusers")
  module, variables = convert.load("wan_dit", weights, fields)
  apart = module.clone(lora_rank=RANK, lora_alpha=ALPHA)
  example = convert.KINDS["wan_dit"].example(apart)
  shapes = jax.eval_shape(apart.init, jax.random.key(0), *example)
  random = np.random.default_rng(0)

  def draw(x):
    return jnp.asarray(0.3 * random.normal(size=x.shape), jnp.float32)

  params = tree.flatten(variables["params"])
  part = {name: draw(params[name]) for name in WHOLE}
  lora = jax.tree.map(draw, shapes["lora"])
  return module, variables["params"], {"lora": lora, "params": nested(part)}


def nested(leaves):
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def merged(params, changes):
  """Merges the changes in float64; returns arrays by name."""
  leaves = {n: np.float64(x) for n, x in tree.flatten(params).items()}
  leaves |= {
    n: np.float64(x) for n, x in tree.flatten(changes["params"]).items()
  }
  factors = {n: np.float64(x) for n, x in tree.flatten(changes["lora"]).items()}
  for name, a in factors.items():
    module, _, factor = name.rpartition("/")
    if factor == "a":
      leaves[f"{module}/kernel"] += ALPHA / RANK * a @ factors[f"{module}/b"]
  return leaves


@pytest.mark.parametrize("name", ["t2v", "i2v"])
@pytest.mark.parametrize("layout", [None, "diffusers", "original"])
def test_is_read_back(tmp_path, layout, name):
  module, params, changes = trained(name)
  written = convert.save_adapter(
    tmp_path / "a", "wan_dit", changes, ALPHA, layout=layout
  )
  assert sorted(written) == sorted((tmp_path / "a").iterdir())
  found = convert.load_lora("wan_dit", tmp_path / "a", module)
  tensors = safetensors.numpy.load_file(written[0])
  # Two factors and alpha of each layer.
  assert found.matched == len(tensors) == 3 * (3 * 6 + 3) + 5
  assert found.rank == RANK
  results = tree.flatten(convert.merge(params, found))
  for name, x in merged(params, changes).items():
    np.testing.assert_allclose(results[name], x, atol=1e-6, err_msg=name)
  part = convert.load_part("wan_dit", tmp_path / "a", module)
  jax.tree.map(np.testing.assert_array_equal, part, changes["params"])


def test_the_factors_keep_every_bit(tmp_path):
  """The collection that is read back has exactly the trained factors."""
  module, _, changes = trained()
  changes = {"lora": changes["lora"]}
  path, _ = convert.save_adapter(tmp_path, "wan_dit", changes, float(RANK))
  updates = convert.load_lora("wan_dit", tmp_path, module)
  _, variables = convert.with_lora("wan_dit", module, updates)
  jax.tree.map(
    np.testing.assert_array_equal, variables["lora"], changes["lora"]
  )
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config["modules_to_save"] == []
  assert (config["r"], config["lora_alpha"]) == (RANK, RANK)
  assert config["target_modules"][-3:] == [
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj",
  ]
  assert "attn1.to_out.0" in config["target_modules"]
  with safetensors.safe_open(path, "numpy") as file:
    assert file.metadata().keys() == {"format", "lora_adapter_metadata"}


def test_the_collection_stands_for_its_product():
  module, params, changes = trained()
  lora = convert.from_collection(changes["lora"], ALPHA)
  apart = module.clone(lora_rank=RANK, lora_alpha=ALPHA)
  random = np.random.default_rng(3)
  inputs = [
    jnp.asarray(random.normal(size=shape), jnp.float32)
    for shape in ((2, 3, 2, 2, 12), (2,), (2, 5, 12), (2, 4, 10))
  ]
  apply = random_weights.jitted(module)
  expected = random_weights.jitted(apart)(
    {"params": params, "lora": changes["lora"]}, *inputs
  )
  found = apply({"params": convert.merge(params, lora)}, *inputs)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert np.abs(found - apply({"params": params}, *inputs)).max() > 0.01


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("without", ["alpha", "header"])
def test_the_file_works_alone(tmp_path, layout, without):
  """The file is renamed, in another folder, and has alpha in one place only."""
  module, params, changes = trained()
  path, _ = convert.save_adapter(
    tmp_path / "a", "wan_dit", changes, ALPHA, layout=layout
  )
  tensors = safetensors.numpy.load_file(path)
  with safetensors.safe_open(path, "numpy") as file:
    metadata = file.metadata()
  if without == "alpha":
    tensors = {n: x for n, x in tensors.items() if not n.endswith(".alpha")}
  else:  # Without the header, replaced modules cannot be recognised.
    metadata, changes = None, {"lora": changes["lora"], "params": {}}
    tensors = {n: x for n, x in tensors.items() if "lora" in n or "alpha" in n}
  (tmp_path / "b").mkdir()
  path = tmp_path / "b" / "style.safetensors"
  safetensors.numpy.save_file(tensors, path, metadata)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = convert.load_lora("wan_dit", path, module)
  results = tree.flatten(convert.merge(params, found))
  for name, x in merged(params, changes).items():
    np.testing.assert_allclose(results[name], x, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
  "where", ["alpha", "lora/time_proj/b", "params/head/bias"]
)
def test_what_is_not_finite_is_not_written(tmp_path, where, bad):
  _, _, changes = trained()
  if where != "alpha":
    leaves = tree.flatten(changes)
    leaves[where] = jnp.asarray(leaves[where]).at[0].set(bad)
    changes = nested(leaves)
  alpha = bad if where == "alpha" else ALPHA
  name = where.partition("/")[2] or rf"alpha \({bad}\)"
  with pytest.raises(errors.UserError, match=f"NaN or infinity in {name}"):
    convert.save_adapter(tmp_path / "a", "wan_dit", changes, alpha)
  assert not (tmp_path / "a").exists()


def test_half_precision(tmp_path):
  module, params, changes = trained()
  (path, _) = convert.save_adapter(
    tmp_path, "wan_dit", changes, ALPHA, dtype=jnp.bfloat16
  )
  tensors = safetensors.numpy.load_file(path)
  (path, _) = convert.save_adapter(tmp_path / "a", "wan_dit", changes, ALPHA)
  whole = safetensors.numpy.load_file(path)
  assert tensors.keys() == whole.keys()
  for name, x in tensors.items():
    stored = np.float32 if name.endswith(".alpha") else jnp.bfloat16
    assert x.dtype == stored, name
    np.testing.assert_array_equal(x, whole[name].astype(stored), err_msg=name)
  found = convert.load_lora("wan_dit", tmp_path, module)
  assert found.rank == RANK
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), changes)
  results = tree.flatten(convert.merge(params, found))
  for name, x in merged(params, rounded).items():
    np.testing.assert_allclose(results[name], x, atol=1e-6, err_msg=name)


def test_replaced_modules_are_not_scaled_nor_replaced_twice(tmp_path):
  module, params, changes = trained()
  convert.save_adapter(tmp_path, "wan_dit", changes, ALPHA)
  with pytest.raises(
    errors.UserError, match="expected a scale of 1, found 0.5"
  ):
    convert.load_lora("wan_dit", tmp_path, module, 0.5)
  found = convert.load_lora("wan_dit", tmp_path, module)
  with pytest.raises(errors.UserError, match="two updates replace head/bias"):
    convert.add([found, found])
  with pytest.raises(errors.UserError, match="can only be merged"):
    convert.with_lora("wan_dit", module, found)


@pytest.mark.parametrize("name", ["blocks.9.attn1.to_q.bias", "proj.weight"])
def test_what_is_no_weight_of_the_model_is_named(tmp_path, name):
  module, _, changes = trained()
  path, _ = convert.save_adapter(tmp_path, "wan_dit", changes, ALPHA)
  tensors = safetensors.numpy.load_file(path)
  tensors[f"base_model.model.{name}"] = np.zeros(16, np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.UserError, match=f"unexpected {name}"):
    convert.load_lora("wan_dit", tmp_path, module)


def test_refusals(tmp_path):
  _, _, changes = trained()
  with pytest.raises(errors.UserError, match="no low-rank updates of wan_dit"):
    convert.save_adapter(tmp_path / "a", "wan_dit", {"lora": {}}, ALPHA)
  with pytest.raises(errors.UserError, match="unknown layout 'keras'"):
    convert.save_adapter(
      tmp_path / "a", "wan_dit", changes, ALPHA, layout="keras"
    )
  other = {"lora": {"adaptor": changes["lora"]["time_proj"]}}
  with pytest.raises(errors.UserError, match="no rule converts adaptor/kernel"):
    convert.save_adapter(tmp_path / "a", "wan_dit", other, ALPHA)
  assert not (tmp_path / "a").exists()


# --- by PEFT itself ----------------------------------------------------------


def assert_peft_merges(base, directory, layout, module, params, changes):
  """Asserts that PEFT merges the directory to the same weights."""
  import peft

  model = peft.PeftModel.from_pretrained(base, str(directory))
  modules = {name for name, _ in model.named_modules()}
  assert any(name.endswith("lora_A.default") for name in modules)
  state = model.merge_and_unload().state_dict()
  expected = {
    name: jnp.asarray(x, jnp.float32)
    for name, x in merged(params, changes).items()
  }
  expected = convert.to_torch(
    "wan_dit", module, {"params": nested(expected)}, layout
  )
  found = {name: x.detach().numpy() for name, x in state.items()}
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, atol=1e-5, err_msg=name)


def run(model, seed=0):
  """The velocity of a `WanTransformer3DModel` for random inputs."""
  import torch

  random = np.random.default_rng(seed)
  shapes = ((1, 12, 3, 2, 2), (1, 5, 12), (1, 4, 10))
  latents, text, image = (
    torch.tensor(random.normal(size=s), dtype=torch.float32) for s in shapes
  )
  with torch.no_grad():
    return model(latents, torch.tensor([500]), text, image).sample.numpy()


@pytest.mark.parity
def test_peft_puts_it_on_diffusers_model(tmp_path):
  import diffusers
  import peft

  module, params, changes = trained()
  convert.save(
    tmp_path / "base", "wan_dit", module, {"params": params}, layout="diffusers"
  )
  convert.save_adapter(tmp_path / "lora", "wan_dit", changes, ALPHA)

  def open_base():
    return diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base")

  before = run(open_base())
  model = peft.PeftModel.from_pretrained(open_base(), str(tmp_path / "lora"))
  updates = convert.load_lora("wan_dit", tmp_path / "lora", module)
  ours = convert.merge(params, updates)
  convert.save(
    tmp_path / "merged", "wan_dit", module, {"params": ours}, layout="diffusers"
  )
  expected = run(
    diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "merged")
  )
  apart = run(model.base_model.model)
  np.testing.assert_allclose(apart, expected, atol=1e-5)
  assert np.abs(apart - before).max() > 0.05
  assert_peft_merges(
    open_base(), tmp_path / "lora", "diffusers", module, params, changes
  )


@pytest.mark.parity
def test_peft_turns_wan_s_own_model_into_it(tmp_path):
  """The file alone, on a base of another latent space."""
  import diffusers
  import peft

  module, params, changes = trained()
  leaves = tree.flatten(params)
  random = np.random.default_rng(5)
  leaves["patch_embed/kernel"] = random.normal(size=(1, 2, 2, 6, 16))
  leaves["head/kernel"] = random.normal(size=(16, 2 * 4))
  leaves["head/bias"] = random.normal(size=8)
  wan = module.clone(in_channels=6, out_channels=2, patch=(1, 2, 2))
  base = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), nested(leaves))
  convert.save(
    tmp_path / "wan", "wan_dit", wan, {"params": base}, layout="diffusers"
  )
  convert.save_adapter(tmp_path / "lora", "wan_dit", changes, ALPHA)
  wan = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "wan")
  model = diffusers.WanTransformer3DModel.from_config(
    wan.config, in_channels=12, out_channels=4, patch_size=(1, 1, 1)
  )
  ends = ("patch_embedding.", "proj_out.")
  rest = wan.state_dict().items()
  model.load_state_dict(
    {n: x for n, x in rest if not n.startswith(ends)}, strict=False
  )
  ours = {name: jnp.asarray(x) for name, x in merged(params, changes).items()}
  ours = {"params": nested(ours)}
  convert.save(tmp_path / "a", "wan_dit", module, ours, layout="diffusers")
  expected = run(
    diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "a")
  )
  wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora"))
  np.testing.assert_allclose(run(wrapped.base_model.model), expected, atol=1e-5)


@pytest.mark.parity
def test_diffusers_reads_updates_alone_at_full_strength(tmp_path):
  import diffusers

  module, params, changes = trained()
  convert.save(
    tmp_path / "base", "wan_dit", module, {"params": params}, layout="diffusers"
  )
  changes = {"lora": changes["lora"], "params": {}}
  path, description = convert.save_adapter(
    tmp_path / "lora", "wan_dit", changes, ALPHA
  )
  description.unlink()
  model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base")
  model.load_lora_adapter(
    path.parent, prefix="base_model.model", weight_name=path.name
  )
  model.fuse_lora()
  model.unload_lora()
  ours = {name: jnp.asarray(x) for name, x in merged(params, changes).items()}
  expected = convert.to_torch("wan_dit", module, {"params": nested(ours)})
  for name, x in model.state_dict().items():
    np.testing.assert_allclose(x, expected[name], atol=1e-5, err_msg=name)


def bare(state):
  """Builds modules that hold a state dict; 2-D weights become linear layers."""
  import torch

  root = torch.nn.Module()
  for name, x in state.items():
    *path, leaf = name.split(".")
    module = root
    for i, part in enumerate(path):
      if part not in dict(module.named_children()):
        weight = state.get(".".join([*path[: i + 1], "weight"]), np.zeros(1))
        linear = weight.ndim == 2
        new = torch.nn.Linear(*weight.shape[::-1]) if linear else None
        module.add_module(part, new or torch.nn.Module())
      module = module.get_submodule(part)
    setattr(module, leaf, torch.nn.Parameter(torch.tensor(x)))
  return root


@pytest.mark.parity
def test_peft_puts_it_on_modules_of_the_original_names(tmp_path):
  module, params, changes = trained()
  state = convert.to_torch("wan_dit", module, {"params": params}, "original")
  convert.save_adapter(tmp_path, "wan_dit", changes, ALPHA, layout="original")
  assert_peft_merges(bare(state), tmp_path, "original", module, params, changes)
