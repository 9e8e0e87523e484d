"""UMT5's encoder, beside `UMT5EncoderModel` of transformers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.sides import Side

NEEDS = {"jax": ("jax",), "torch": ("torch", "transformers")}
# A table of 256384 tokens is 4 GiB that no block reads.
_VOCAB = 1024


def request(
  fields: Mapping[str, Any], layers: int, tokens: int, dtype: str = "float32"
) -> dict[str, Any]:
  """Returns what both sides take.

  Args:
    fields: of `UMT5Encoder`; the vocabulary is made small.
    layers: number of blocks.
    tokens: of the text, none of which is padding.
    dtype: of weights and computation.
  """
  from dcvideogen_jax.convert import api

  fields = {**fields, "layers": layers, "vocab": _VOCAB}
  kind = api.KINDS["umt5"]
  module = kind.build(fields)
  return {
    "fields": fields,
    "config": kind.configs["transformers"](api.config_of(module)),
    "shapes": inputs.torch_shapes("umt5", "transformers", module),
    "tokens": tokens,
    "dtype": dtype,
  }


def _ids(request: Mapping[str, Any]) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(0, _VOCAB, (1, request["tokens"])).astype(np.int32)


def jax(request: Mapping[str, Any]) -> Side:
  """Builds the module, and compiles it."""
  import jax
  import jax.numpy as jnp

  from dcvideogen_jax.convert import api

  dtype = jnp.dtype(request["dtype"])
  module = api.KINDS["umt5"].build(
    request["fields"], dtype=dtype, param_dtype=dtype
  )
  params = inputs.params("umt5", "transformers", module, request["shapes"])
  ids = jnp.asarray(_ids(request))
  arguments = ({"params": params}, ids, jnp.ones_like(ids))
  encode, seconds, work = inputs.compiled(jax.jit(module.apply), *arguments)
  return Side(
    {"encode": lambda: np.asarray(encode(*arguments), np.float32)},
    seconds,
    lambda: {"encode": work()},
  )


def torch(request: Mapping[str, Any]) -> Side:
  """Builds the model of transformers."""
  import torch
  from transformers import UMT5Config, UMT5EncoderModel

  with torch.device("meta"):
    model = UMT5EncoderModel(UMT5Config(**request["config"]))
  dtype = getattr(torch, request["dtype"])
  weights = {
    name: x.to(dtype)
    for name, x in inputs.torch_weights(request["shapes"]).items()
  }
  weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
  model.load_state_dict(weights, assign=True)
  model.eval()
  ids = torch.from_numpy(_ids(request)).long()

  def encode():
    with torch.inference_mode():
      found = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return found.last_hidden_state.float().numpy()

  return Side({"encode": encode})
