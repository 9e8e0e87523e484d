"""Updates that PEFT and diffusers write give what they merge themselves."""

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
  """PEFT starts with an update of zero."""
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
  # A down and an up for a kernel, and what is added to its bias.
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
  ],
  ids=["plain", "rslora", "bias", "patterns"],
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


def test_a_file_of_diffusers(transformer, tmp_path):
  """With alpha in the header, as its pipelines write it."""
  import diffusers
  import peft
  from diffusers.training_utils import _collate_lora_metadata

  base = {n: x.copy() for n, x in numpy(transformer.state_dict()).items()}
  config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["to_k", "to_v"])
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
