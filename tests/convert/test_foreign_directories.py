"""Directories that diffusers and transformers write and open, both ways."""

import ml_dtypes
import numpy as np
import pytest

from dcvideogen_jax import convert
from tests import random_weights
from tests.convert import checkpoints

pytestmark = pytest.mark.parity


def foreign(kind):
  """Returns the class that opens a kind's directories, and a tiny config."""
  if kind == "wan_vae":
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan, {
      "base_dim": 8,
      "z_dim": 4,
      "dim_mult": [1, 2, 2],
      "num_res_blocks": 1,
      "temperal_downsample": [False, True],
      "latents_mean": [0.1, 0.2, 0.3, 0.4],
      "latents_std": [1.0, 1.1, 1.2, 1.3],
    }
  import transformers

  if kind == "umt5":
    return transformers.UMT5EncoderModel, {
      "vocab_size": 40,
      "d_model": 16,
      "num_layers": 2,
      "num_heads": 2,
      "d_kv": 8,
      "d_ff": 24,
    }
  return transformers.CLIPVisionModel, {
    "image_size": 8,
    "patch_size": 4,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_act": "gelu",
  }


def make(kind):
  import torch

  torch.manual_seed(0)
  cls, config = foreign(kind)
  if kind == "wan_vae":
    return cls, cls(**config).eval()
  return cls, cls(cls.config_class(**config)).eval()


def outputs(kind, module):
  """Runs the module on a random input."""
  import torch

  torch.manual_seed(1)
  with torch.no_grad():
    if kind == "wan_vae":
      return module(torch.randn(1, 3, 5, 8, 8)).sample.numpy()
    if kind == "umt5":
      ids = torch.randint(2, 40, (2, 7))
      return module(input_ids=ids).last_hidden_state.numpy()
    return module(pixel_values=torch.randn(2, 3, 8, 8)).pooler_output.numpy()


@pytest.mark.parametrize("kind", ["wan_vae", "umt5", "clip_vision"])
def test_read_then_written_then_opened(tmp_path, kind):
  cls, module = make(kind)
  module.save_pretrained(tmp_path / "theirs", max_shard_size="6kB")
  files = [*(tmp_path / "theirs").glob("*.safetensors")]
  assert len(files) > 1
  loaded = convert.load(kind, tmp_path / "theirs")
  layout = next(iter(convert.KINDS[kind].layouts))
  convert.save(tmp_path / "ours", kind, *loaded, layout=layout, shard_size=6000)
  opened, report = cls.from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  assert not any(report.values()), report
  np.testing.assert_array_equal(
    outputs(kind, opened.eval()), outputs(kind, module)
  )
  # Our own directories need no library's config.json.
  convert.save(tmp_path / "own", kind, *loaded)
  again = convert.load(kind, tmp_path / "own")
  assert again[0] == loaded[0]
  checkpoints.assert_same(
    convert.to_torch(kind, *again), convert.to_torch(kind, *loaded)
  )


def inputs(fields):
  """Latents, time, text and, where the model has it, image features."""
  random = np.random.default_rng(1)
  shapes = [(2, 2, 4, 4, fields["in_channels"]), (2,)]
  # With images, diffusers takes the last 512 tokens for the text.
  shapes.append((2, 512, fields["text_width"]))
  if fields["image_width"] is not None:
    shapes.append((2, 5, fields["image_width"]))
  return [random.normal(size=s).astype(np.float32) for s in shapes]


def sample(module, arguments):
  import torch

  latents, *rest = map(torch.from_numpy, arguments)
  names = ("timestep", "encoder_hidden_states", "encoder_hidden_states_image")
  with torch.no_grad():
    found = module(
      hidden_states=latents.movedim(-1, 1),
      **dict(zip(names, rest, strict=False)),
    ).sample
  return found.movedim(1, -1).numpy()


@pytest.mark.parametrize("name", ["T2V", "I2V"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_transformers_that_diffusers_opens(tmp_path, name, dtype):
  import diffusers

  fields = getattr(checkpoints, name)
  weights = checkpoints.state_dict("wan_dit", fields, "original", dtype)
  module, variables = convert.load("wan_dit", weights, fields)
  convert.save(
    tmp_path,
    "wan_dit",
    module,
    variables,
    layout="diffusers",
    shard_size=4000,
  )
  opened, report = diffusers.WanTransformer3DModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(report.values()), report
  arguments = inputs(convert.config_of(module))
  np.testing.assert_allclose(
    sample(opened.float().eval(), arguments),
    random_weights.jitted(module)(variables, *arguments),
    atol=1e-5,
  )
