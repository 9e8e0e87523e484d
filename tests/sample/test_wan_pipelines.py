"""Wan's own models against diffusers 0.42.1, from its directories to frames.

`WanPipeline` and `WanImageToVideoPipeline` of random small models are saved,
loaded from there and given the same prompt, images and noise. They get images
of the video's size, as in their documentation.
"""

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax.sample import pipeline
from tests.sample import published

pytestmark = pytest.mark.parity

PROMPT = "A red ball  rolls over a bridge &amp; falls"
NEGATIVE = "blurred, 静态"
SIZE = {"height": 16, "width": 32}
FRAMES = 9
STEPS = 3
RANDOM = np.random.default_rng(0)
PHOTOS = RANDOM.integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
NOISE = RANDOM.normal(size=(1, 4, 3, 4, 8)).astype(np.float32)


def transformer(task):
  import diffusers

  image = {"image_dim": 16, "added_kv_proj_dim": 24, "in_channels": 12}
  if task == "flf2v":
    image["pos_embed_seq_len"] = 10
  return diffusers.WanTransformer3DModel(
    **{
      "patch_size": (1, 2, 2),
      "num_attention_heads": 2,
      "attention_head_dim": 12,
      "in_channels": 4,
      "out_channels": 4,
      "text_dim": 16,
      "freq_dim": 16,
      "ffn_dim": 32,
      "num_layers": 2,
      "cross_attn_norm": True,
      "qk_norm": "rms_norm_across_heads",
      **(image if task != "t2v" else {}),
    }
  ).eval()


def texts():
  import transformers

  config = transformers.UMT5Config(
    vocab_size=1024, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(published.TINY / "tokenizer" / "tokenizer.json"),
    pad_token="<pad>",
    eos_token="</s>",
    unk_token="<unk>",
  )
  return {
    "text_encoder": transformers.UMT5EncoderModel(config).eval(),
    "tokenizer": tokenizer,
  }


def images():
  import transformers

  config = transformers.CLIPVisionConfig(
    image_size=28,
    patch_size=14,
    num_hidden_layers=3,
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=24,
    hidden_act="gelu",
  )
  size = {"height": 28, "width": 28}
  return {
    "image_encoder": transformers.CLIPVisionModel(config).eval(),
    "image_processor": transformers.CLIPImageProcessor(
      size={"shortest_edge": 28}, crop_size=size
    ),
  }


def make(task):
  """Makes diffusers' pipeline of random models."""
  import diffusers
  import torch

  torch.manual_seed(0)
  vae = diffusers.AutoencoderKLWan(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    scale_factor_spatial=4,
    scale_factor_temporal=4,
    latents_mean=[0.1, -0.2, 0.3, 0.0],
    latents_std=[1.1, 0.9, 1.3, 0.7],
  ).eval()
  scheduler = diffusers.UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
  )
  cls = diffusers.WanImageToVideoPipeline
  if task == "t2v":
    cls = diffusers.WanPipeline
  made = cls(
    transformer=transformer(task),
    vae=vae,
    scheduler=scheduler,
    **texts(),
    **({} if task == "t2v" else images()),
  )
  made.set_progress_bar_config(disable=True)
  return made


def run_theirs(made, given):
  import torch

  found = {}
  arguments = {
    "prompt": PROMPT,
    "negative_prompt": NEGATIVE,
    "latents": torch.from_numpy(NOISE),
    "num_frames": FRAMES,
    "num_inference_steps": STEPS,
    "guidance_scale": 4.0,
    **SIZE,
    **{
      name: PIL.Image.fromarray(x).resize((SIZE["width"], SIZE["height"]))
      for name, x in given.items()
    },
  }

  def keep(_, step, __, tensors):
    if step == STEPS - 1:
      found["latents"] = np.moveaxis(tensors["latents"].numpy(), 1, -1)
    return {}

  video = made(**arguments, output_type="np", callback_on_step_end=keep)
  return found["latents"], video.frames


@pytest.mark.parametrize(
  ("task", "photos"),
  [("t2v", []), ("i2v", ["image"]), ("flf2v", ["image", "last_image"])],
)
def test_latents_and_video(tmp_path, task, photos):
  theirs = make(task)
  theirs.save_pretrained(tmp_path)
  given = dict(zip(photos, PHOTOS, strict=False))
  latents, video = run_theirs(theirs, given)

  ours = pipeline.DCVideoGen.from_pretrained(
    tmp_path, task="t2v" if task == "t2v" else "i2v"
  )
  assert ours.parts.options.grid == "diffusers_0_37"
  found = ours.generate(
    PROMPT,
    negative_prompt=NEGATIVE,
    noise=np.moveaxis(NOISE, 1, -1),
    frames=FRAMES,
    steps=STEPS,
    guidance_scale=4.0,
    **SIZE,
    **given,
  )
  assert np.std(latents) > 0.5
  np.testing.assert_allclose(found.latents, latents, atol=5e-5, rtol=0)
  difference = np.abs(found.video() - 255 * video)
  assert difference.max() < 0.5 + 255 * 5e-5
