"""A whole sampling of the tiny model: text, solver with guidance, decoding.

The peer is made of the same weights in transformers' UMT5, diffusers'
transformer and UniPC, and `torch_dc_ae_v`.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.sides import Side

NEEDS = {"jax": ("jax",), "torch": ("torch", "diffusers", "transformers")}
_PROMPT = "a large yellow circle moves right over desert"
# The grid of noise levels is that of this version of diffusers.
_VERSION = "0.42.1"


def request(
  steps: int = 16, guidance: float = 3.0, videos: int = 1
) -> dict[str, Any]:
  """Returns what both sides take: 16 frames of 64x64 for each video."""
  return {
    "steps": steps,
    "guidance": guidance,
    "latents": [videos, 4, 2, 2, 64],
  }


def _folder(*names: str) -> pathlib.Path:
  import dcvideogen_jax

  return pathlib.Path(dcvideogen_jax.__file__).parent.joinpath("assets", *names)


def _scheduler() -> dict[str, Any]:
  path = _folder("dcvideogen_tiny", "scheduler", "scheduler_config.json")
  return {**json.loads(path.read_text()), "_diffusers_version": _VERSION}


def jax(request: Mapping[str, Any]) -> Side:
  """Loads the pipeline; the first run compiles."""
  from dcvideogen_jax.diffusion import flow
  from dcvideogen_jax.sample import model_names, pipeline

  model = pipeline.DCVideoGen.from_pretrained(
    model_names.pipeline("tiny"), dtype="float32"
  )
  (noise,) = inputs.normal(request["latents"])

  def run():
    # Embeddings are kept, so a new embedder stands for a new prompt.
    model.embedder = type(model.embedder)(model.parts.texts)
    made = model.generate(
      [_PROMPT] * len(noise),
      negative_prompt="",
      height=64,
      width=64,
      frames=16,
      noise=noise,
      steps=request["steps"],
      guidance_scale=request["guidance"],
      options=flow.from_config(_scheduler()),
    )
    return made.video().astype(np.float32)

  return Side({"sample": run})


def torch(request: Mapping[str, Any]) -> Side:
  """Loads the same weights into the peer."""
  import torch
  from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
  from safetensors.torch import load_file
  from transformers import UMT5EncoderModel

  from benchmarks import torch_dc_ae_v
  from dcvideogen_jax.data import tokenize

  tiny = functools.partial(_folder, "dcvideogen_tiny")
  text_encoder = UMT5EncoderModel.from_pretrained(
    tiny("text_encoder"), dtype=torch.float32
  ).eval()
  tokenizer = tokenize.Tokenizer.from_directory(tiny("tokenizer"))
  transformer = WanTransformer3DModel.from_pretrained(
    tiny("transformer_t2v"), torch_dtype=torch.float32
  )
  config = json.loads(_folder("dc_ae_v_tiny", "config.json").read_text())
  weights = load_file(_folder("dc_ae_v_tiny", "model.safetensors"))
  decoder = torch_dc_ae_v.Peer(
    {name: x.float() for name, x in weights.items()}, config
  )
  length = json.loads(tiny("parts.json").read_text())["text_tokens"]
  (noise,) = inputs.normal(request["latents"])
  noise = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())

  def embed(text):
    ids, mask = map(torch.from_numpy, tokenizer([text], length))
    found = text_encoder(input_ids=ids.long(), attention_mask=mask)
    text = found.last_hidden_state * mask[..., None]
    return text.expand(len(noise), -1, -1)

  def run():
    with torch.inference_mode():
      scheduler = UniPCMultistepScheduler.from_config(_scheduler())
      scheduler.set_timesteps(request["steps"])
      texts = torch.cat([embed(_PROMPT), embed("")])
      x = noise
      for time in scheduler.timesteps:
        both = torch.cat([x, x])
        (found,) = transformer(
          both, time.expand(len(both)), texts, return_dict=False
        )
        wanted, unwanted = found.chunk(2)
        velocity = unwanted + request["guidance"] * (wanted - unwanted)
        (x,) = scheduler.step(velocity, time, x, return_dict=False)
      video = decoder.decode(x / config["latent_scale"])
    video = np.moveaxis(video.numpy(), 1, -1)
    return np.round(np.clip(video, -1, 1) * 127.5 + 127.5)

  return Side(
    {"sample": run}, flops=lambda: {"sample": inputs.torch_flops(run)}
  )
