"""DoRA, LoHa, LoKr, (IA)3, PiSSA and OLoRA of PEFT and diffusers are merged."""

import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import wan_dit
from dcvideogen_jax.models import wan_dit as model
from tests.convert import checkpoints

pytestmark = pytest.mark.parity
FIELDS = checkpoints.T2V | {"layers": 2}
LINEAR = ["attn1.to_q", "attn2.to_k", "ffn.net.2"]


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


def state(transformer):
  found = transformer.state_dict().items()
  return {name: x.detach().numpy().copy() for name, x in found}


def train(wrapped):
  """Draws what PEFT trains, around its start."""
  import torch

  for name, x in wrapped.named_parameters():
    if x.requires_grad:
      size = 0.1 if "magnitude" in name or "ia3" in name else 0.3
      x.data += size * torch.randn_like(x)


def largest_error(base, source, merged, scale=1.0):
  """Returns the largest error of a file's merged weights."""
  module, variables = convert.load("wan_dit", base, FIELDS)
  updates = convert.load_lora("wan_dit", source, module, scale)
  params = convert.merge(variables["params"], updates)
  found = convert.to_torch("wan_dit", module, {"params": params})
  return max(np.abs(found[n] - x).max() for n, x in merged.items())


def config(kind, **fields):
  import peft

  kinds = {
    "lora": peft.LoraConfig,
    "loha": peft.LoHaConfig,
    "lokr": peft.LoKrConfig,
    "ia3": peft.IA3Config,
  }
  return kinds[kind](**{"target_modules": LINEAR} | fields)


DORA = {"r": 3, "lora_alpha": 5, "use_dora": True}
START = {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"}
CONVOLUTION = {"target_modules": [*LINEAR, "patch_embedding"]}
KINDS = {
  "DoRA": ("lora", DORA | CONVOLUTION),
  "DoRA, rsLoRA": ("lora", DORA | {"use_rslora": True}),
  "LoHa": ("loha", {"r": 3, "alpha": 5}),
  "LoHa, patterns": (
    "loha",
    {"r": 3, "alpha": 5, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"0": 9}}
    | {"alpha_pattern": {"blocks.1.attn1.to_q": 9}},
  ),
  "LoKr": ("lokr", {"r": 1, "alpha": 5, "decompose_factor": 4}),
  "LoKr, both factored": (
    "lokr",
    {"r": 1, "alpha": 5, "decompose_both": True},
  ),
  "LoKr, none factored": (
    "lokr",
    {"r": 16, "alpha": 5, "rank_pattern": {"to_k": 8}},
  ),
  "(IA)3": (
    "ia3",
    CONVOLUTION | {"feedforward_modules": ["ffn.net.2"]},
  ),
  "(IA)3 of a convolution's inputs": (
    "ia3",
    CONVOLUTION | {"feedforward_modules": ["patch_embedding"]},
  ),
  "PiSSA": ("lora", START | {"rank_pattern": {"to_k": 5}}),
  "PiSSA, rsLoRA, DoRA": (
    "lora",
    START | {"use_rslora": True, "use_dora": True},
  ),
  "OLoRA": ("lora", START | {"init_lora_weights": "olora"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*start of the factors")
def test_a_directory_of_peft(transformer, tmp_path, kind):
  import peft

  base = state(transformer)
  name, fields = KINDS[kind]
  wrapped = peft.get_peft_model(transformer, config(name, **fields))
  train(wrapped)
  wrapped.save_pretrained(tmp_path)
  merged = state(wrapped.merge_and_unload())
  changed = [n for n, x in merged.items() if np.abs(x - base[n]).max() > 0.01]
  assert len(changed) >= 6
  error = largest_error(base, tmp_path, merged)
  print(f"PEFT, {kind}: {error:.1e}")
  assert error < 4e-6
  halfway = {n: (base[n] + x) / 2 for n, x in merged.items()}
  assert largest_error(base, tmp_path, halfway, 0.5) < 4e-6


def test_dora_of_diffusers(transformer, tmp_path):
  """With alpha in the header, as its pipelines write it."""
  import diffusers
  import peft
  from diffusers.training_utils import _collate_lora_metadata

  base = state(transformer)
  transformer.add_adapter(config("lora", **DORA))
  train(transformer)
  layers = peft.get_peft_model_state_dict(transformer)
  diffusers.WanPipeline.save_lora_weights(
    tmp_path,
    transformer_lora_layers=layers,
    **_collate_lora_metadata({"transformer": transformer}),
  )
  transformer.fuse_lora()
  transformer.unload_lora()
  error = largest_error(base, tmp_path, state(transformer))
  print(f"diffusers, DoRA: {error:.1e}")
  assert error < 4e-6


def test_the_start_is_told(transformer, tmp_path):
  import peft

  base = state(transformer)
  wrapped = peft.get_peft_model(transformer, config("lora", **START))
  wrapped.save_pretrained(tmp_path)
  module = convert.load("wan_dit", base, FIELDS)[0]
  with pytest.warns(UserWarning, match=r"factors \(pissa\) is computed again"):
    convert.load_lora("wan_dit", tmp_path, module)


def test_a_random_start_is_refused(transformer, tmp_path):
  import peft

  base = state(transformer)
  fields = START | {"init_lora_weights": "pissa_niter_2"}
  wrapped = peft.get_peft_model(transformer, config("lora", **fields))
  wrapped.save_pretrained(tmp_path)
  module = convert.load("wan_dit", base, FIELDS)[0]
  with pytest.raises(errors.UserError) as e:
    convert.load_lora("wan_dit", tmp_path, module)
  assert str(e.value) == (
    f"{tmp_path / 'adapter_config.json'}: with init_lora_weights="
    "'pissa_niter_2' PEFT has taken a random decomposition, which cannot be"
    " repeated, off the base that the updates belong to: expected updates of"
    " the base itself; PEFT writes them with save_pretrained(...,"
    " path_initial_model_for_weight_conversion=...)"
  )
