"""Adapters of LyCORIS are merged as its trained layers compute.

LyCORIS's own merge is no reference: it applies alpha / rank twice for LoKr and
LoHa.
"""

import numpy as np
import pytest

from dcvideogen_jax import convert
from dcvideogen_jax.convert import wan_dit
from dcvideogen_jax.models import wan_dit as model
from tests.convert import checkpoints

pytestmark = pytest.mark.parity
FIELDS = checkpoints.T2V | {"layers": 2}
TUCKER = {"use_tucker": True}
ROWS = {"weight_decompose": True}
COLUMNS = ROWS | {"wd_on_out": False}
LORA = {"algo": "lora", "dim": 4, "alpha": 2}
LOHA = {"algo": "loha", "dim": 3, "alpha": 2}
LOKR = {"algo": "lokr", "dim": 1, "alpha": 3, "factor": 4}
IA3 = {"algo": "ia3"}
KINDS = {
  "lora": LORA,
  "rslora": LORA | {"rs_lora": True},
  "lora with a scalar": LORA | {"use_scalar": True},
  "dora by rows": LORA | ROWS,
  "dora by columns": LORA | COLUMNS,
  "loha": LOHA,
  "rsloha": LOHA | {"rs_lora": True},
  "loha with dora by rows": LOHA | ROWS,
  "loha with dora by columns": LOHA | COLUMNS,
  "lokr": LOKR,
  "lokr, both factored": LOKR | {"decompose_both": True, "factor": -1},
  "lokr, none factored": LOKR | {"full_matrix": True},
  "lokr with dora by rows": LOKR | ROWS,
  "lokr with dora by columns": LOKR | COLUMNS,
  "ia3 of outputs": IA3,
  "ia3 of inputs": IA3 | {"train_on_input": True},
  "full": {"algo": "full"},
}
CONVOLUTIONS = {
  "lora": LORA,
  "lora with a core": LORA | TUCKER,
  "lora with a core, dora by columns": LORA | TUCKER | COLUMNS,
  "loha": LOHA,
  "loha with cores": LOHA | TUCKER,
  "lokr": LOKR,
  "lokr with a core, dora by rows": LOKR | TUCKER | ROWS,
  "lokr, none factored": LOKR | {"full_matrix": True},
  "ia3 of outputs": IA3,
  "ia3 of inputs": IA3 | {"train_on_input": True},
}


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
  return {n: x.detach().numpy() for n, x in transformer.state_dict().items()}


def trained(layer, name):
  """Returns the weights and biases that a layer's outputs show."""
  import torch

  with torch.no_grad():
    if isinstance(layer, torch.nn.LayerNorm):
      x = torch.randn(1, *layer.normalized_shape)
      up, down = layer(x)[0], layer(-x)[0]
      bias = (up + down) / 2
      flat = torch.nn.functional.layer_norm(
        x, layer.normalized_shape, eps=layer.eps
      )
      weight = (up - down) / 2 / flat[0]
    elif isinstance(layer, torch.nn.Conv3d):
      shape = (layer.in_channels, *layer.kernel_size)
      count = int(np.prod(shape))
      bias = layer(torch.zeros(1, *shape)).flatten()
      outputs = layer(torch.eye(count).reshape(count, *shape))
      weight = (outputs.reshape(count, -1) - bias).T.reshape(-1, *shape)
    else:
      bias = layer(torch.zeros(1, layer.in_features))[0]
      weight = (layer(torch.eye(layer.in_features)) - bias).T
  return {f"{name}.weight": weight.numpy(), f"{name}.bias": bias.numpy()}


def largest_errors(transformer, path, kinds, train_norm=False):
  """Trains layers with LyCORIS, and returns name -> error of merged weights."""
  import lycoris
  import torch

  base = {n: x.copy() for n, x in state(transformer).items()}
  targets = {"target_module": [], "target_name": [*kinds]}
  lycoris.LycorisNetwork.apply_preset(targets | {"name_algo_map": kinds})
  network = lycoris.create_lycoris(transformer, 1.0, train_norm=train_norm)
  assert len(network.loras) == len(kinds)
  network.apply_to()
  for name, x in network.named_parameters():
    if "dora_scale" in name:
      x.data *= torch.rand_like(x) + 0.5
    elif x.ndim:
      torch.nn.init.normal_(x, std=0.3)
    else:
      x.data += 0.7
  network.save_weights(str(path), torch.float32, {})
  merged = dict(base)
  for name in kinds:
    merged |= trained(transformer.get_submodule(name), name)
    change = merged[f"{name}.weight"] - base[f"{name}.weight"]
    assert np.abs(change).max() > 0.02, name
  module, variables = convert.load("wan_dit", base, FIELDS)
  updates = convert.load_lora("wan_dit", path, module)
  params = convert.merge(variables["params"], updates)
  found = convert.to_torch("wan_dit", module, {"params": params})
  return {n: np.abs(found[n] - x).max() for n, x in merged.items()}


def test_linear_layers(transformer, tmp_path):
  """Merged weights are those computed from the outputs of LyCORIS's layers."""
  parts = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_out.0")
  names = [f"blocks.{i}.{x}" for i in (0, 1) for x in (*parts, "ffn.net.2")]
  names += [f"blocks.{i}.{x}" for i in (0, 1) for x in ("attn1.to_k",)]
  names += [f"blocks.{i}.ffn.net.0.proj" for i in (0, 1)]
  names += ["proj_out", "condition_embedder.time_proj", "blocks.1.attn2.to_q"]
  kinds = dict(zip(names, KINDS.values(), strict=True))
  found = largest_errors(transformer, tmp_path / "a.safetensors", kinds)
  for name, kind in zip(names, KINDS, strict=True):
    print(f"LyCORIS, {kind}: {found[f'{name}.weight']:.1e}")
  # Weights have the size of 1.
  assert max(found.values()) < 4e-6, found


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_patch_embedding(transformer, tmp_path, kind):
  kinds = {"patch_embedding": CONVOLUTIONS[kind]}
  found = largest_errors(transformer, tmp_path / "a.safetensors", kinds)
  print(f"LyCORIS, convolution, {kind}: {max(found.values()):.1e}")
  assert max(found.values()) < 4e-6, found


def test_norms(transformer, tmp_path):
  kinds = {f"blocks.{i}.norm2": LORA for i in (0, 1)}
  found = largest_errors(transformer, tmp_path / "a.safetensors", kinds, True)
  print(f"LyCORIS, norms: {max(found.values()):.1e}")
  # Seen through LayerNorm's outputs, which are divided by small numbers.
  assert max(found.values()) < 1e-4, found
