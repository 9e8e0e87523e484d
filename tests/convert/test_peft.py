"""Updates of PEFT and diffusers are merged as those libraries merge them."""

import numpy as np
import pytest

from dcvideogen_jax import convert
from dcvideogen_jax.convert import wan_dit
from dcvideogen_jax.models import wan_dit as model
from tests.convert import checkpoints

pytestmark = pytest.mark.parity
FIELDS = checkpoints.T2V


@pytest.fixture
def transformer():
  """A random `WanTransformer3DModel`."""
  import diffusers
  import torch

  torch.manual_seed(0)
  fields = convert.config_of(model.build(FIELDS))
  config = wan_dit.config_to(fields)
  config.pop("_class_name")
  return diffusers.WanTransformer3DModel(**config)


def numpy(state_dict):
  return {name: x.detach().numpy() for name, x in state_dict.items()}


def randomise(module):
  """Draws random updates: PEFT starts with updates of zero."""
  import torch

  for name, x in module.named_parameters():
    if "lora" in name:
      torch.nn.init.normal_(x, std=0.3)


def assert_merged(base, source, merged):
  loaded = convert.load("wan_dit", base, FIELDS)
  lora = convert.load_lora("wan_dit", source, loaded[0])
  params = convert.merge(loaded[1]["params"], lora)
  found = convert.to_torch("wan_dit", loaded[0], {"params": params})
  changed = [n for n in base if np.abs(merged[n] - base[n]).max() > 0.01]
  # A kernel has two factors, and a bias one difference.
  biases = sum(name.endswith("bias") for name in changed)
  assert lora.matched == 2 * (len(changed) - biases) + biases > 8
  for name, x in merged.items():
    np.testing.assert_allclose(found[name], x, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  "options",
  [
    {"r": 3, "lora_alpha": 5},
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {"r": 2, "lora_alpha": 8, "lora_bias": True},
    {
      "r": 4,
      "lora_alpha": 6,
      "rank_pattern": {"attn1.to_q": 2},
      "alpha_pattern": {"blocks.1.attn1.to_q": 9, "proj_out": 1},
    },
    {
      "r": 4,
      "lora_alpha": 4,
      "rank_pattern": {"^blocks.0.ffn.net.2": 8},
      "alpha_pattern": {
        "^blocks.1.attn1.to_q": 32,
        r"^proj_out|^blocks\.0\.ffn\.net\.2": 16,
        "^ffn.net.2": 64,
      },
    },
  ],
  ids=["plain", "rslora", "bias", "patterns", "anchored"],
)
def test_a_directory_of_peft(transformer, tmp_path, options):
  import peft

  base = numpy(transformer.state_dict())
  base = {name: x.copy() for name, x in base.items()}
  targets = ["attn1.to_q", "attn2.to_out.0", "ffn.net.2", "proj_out"]
  config = peft.LoraConfig(target_modules=targets, **options)
  wrapped = peft.get_peft_model(transformer, config)
  randomise(wrapped)
  wrapped.save_pretrained(tmp_path)
  merged = numpy(wrapped.merge_and_unload().state_dict())
  assert_merged(base, tmp_path, merged)
  assert_merged(base, tmp_path / "adapter_model.safetensors", merged)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_peft_has_trained(transformer, tmp_path, bias):
  """They replace those of the base, and say nothing about the scale."""
  import peft
  import torch

  base = {n: x.copy() for n, x in numpy(transformer.state_dict()).items()}
  config = peft.LoraConfig(
    r=2, lora_alpha=12, target_modules=["attn1.to_q", "proj_out"], bias=bias
  )
  wrapped = peft.get_peft_model(transformer, config)
  randomise(wrapped)
  for name, x in wrapped.named_parameters():
    if x.requires_grad and "lora" not in name:
      torch.nn.init.normal_(x, std=0.3)
  wrapped.save_pretrained(tmp_path)
  merged = numpy(wrapped.merge_and_unload().state_dict())
  loaded = convert.load("wan_dit", base, FIELDS)
  lora = convert.load_lora("wan_dit", tmp_path, loaded[0])
  assert len(lora.whole) > 1
  params = convert.merge(loaded[1]["params"], lora)
  found = convert.to_torch("wan_dit", loaded[0], {"params": params})
  for name, x in merged.items():
    np.testing.assert_allclose(found[name], x, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian"])
def test_updates_that_peft_has_converted(transformer, tmp_path, start):
  """PEFT writes them for the base itself."""
  import peft

  base = {n: x.copy() for n, x in numpy(transformer.state_dict()).items()}
  config = peft.LoraConfig(
    r=2, lora_alpha=4, target_modules=["to_k", "to_v"], init_lora_weights=start
  )
  wrapped = peft.get_peft_model(transformer, config)
  if start != "gaussian":
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = start
  randomise(wrapped)
  convertible = None if start == "gaussian" else str(tmp_path / "start")
  wrapped.save_pretrained(
    tmp_path / "lora", path_initial_model_for_weight_conversion=convertible
  )
  merged = numpy(wrapped.merge_and_unload().state_dict())
  assert_merged(base, tmp_path / "lora", merged)


@pytest.mark.parametrize(
  "options",
  [
    {"r": 3, "lora_alpha": 12},
    {
      "r": 4,
      "lora_alpha": 4,
      "rank_pattern": {"^blocks.0.attn1.to_k": 2},
      "alpha_pattern": {"^blocks.1.attn2.to_v": 16},
    },
  ],
  ids=["plain", "anchored"],
)
def test_a_file_of_diffusers(transformer, tmp_path, options):
  """With alpha in the header, as its pipelines write it."""
  import diffusers
  import peft
  from diffusers.training_utils import _collate_lora_metadata

  base = {n: x.copy() for n, x in numpy(transformer.state_dict()).items()}
  config = peft.LoraConfig(target_modules=["to_k", "to_v"], **options)
  transformer.add_adapter(config)
  randomise(transformer)
  diffusers.WanPipeline.save_lora_weights(
    tmp_path,
    transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
    **_collate_lora_metadata({"transformer": transformer}),
  )
  transformer.fuse_lora()
  transformer.unload_lora()
  merged = numpy(transformer.state_dict())
  (path,) = tmp_path.iterdir()
  assert_merged(base, path, merged)


def test_mixed_ranks_through_diffusers(transformer, tmp_path):
  """Mixed ranks load without a description, and with that of diffusers.

  diffusers describes them by anchored patterns.
  """
  import diffusers
  import safetensors.torch
  import torch
  from diffusers.training_utils import _collate_lora_metadata
  from peft import get_peft_model_state_dict

  base = {n: x.copy() for n, x in numpy(transformer.state_dict()).items()}
  tensors = {}
  for i, (block, rank) in enumerate([(0, 2), (1, 2), (2, 4)]):
    for j, name in enumerate(("to_q", "to_k")):
      module = f"transformer.blocks.{block}.attn1.{name}"
      rank += j
      torch.manual_seed(10 * i + j)
      tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 16)
      tensors[f"{module}.lora_B.weight"] = torch.randn(16, rank)
  safetensors.torch.save_file(tensors, tmp_path / "mixed.safetensors")
  transformer.load_lora_adapter(tmp_path, weight_name="mixed.safetensors")
  (adapter,) = transformer.peft_config
  transformer.peft_config["default"] = transformer.peft_config[adapter]
  diffusers.WanPipeline.save_lora_weights(
    tmp_path / "saved",
    transformer_lora_layers=get_peft_model_state_dict(
      transformer, adapter_name=adapter
    ),
    **_collate_lora_metadata({"transformer": transformer}),
  )
  del transformer.peft_config["default"]
  transformer.fuse_lora()
  transformer.unload_lora()
  merged = numpy(transformer.state_dict())
  assert_merged(base, tmp_path / "mixed.safetensors", merged)
  (path,) = (tmp_path / "saved").iterdir()
  assert_merged(base, path, merged)
