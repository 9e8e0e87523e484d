"""Names of UMT5's encoder and its config.json, in both layouts.

"transformers" is `UMT5EncoderModel` (transformers 5.23), "original" the file
`models_t5_umt5-xxl-enc-bf16.pth` of Wan-Video/Wan2.1 (commit 9737cba).
"""

import re
from collections.abc import Mapping
from typing import Any

from dcvideogen_jax import errors
from dcvideogen_jax.convert.naming import (
  COPY,
  DENSE,
  Layout,
  Rule,
  with_scales,
)

# JAX name -> layout, names in transformers and in the original.
_ARRAYS: dict[str, tuple[Layout, str, str]] = {
  "token_embedding": (COPY, "shared", "token_embedding"),
  "norm/scale": (COPY, "encoder.final_layer_norm", "norm"),
}
# The same for the parameters of a block.
_BLOCK: dict[str, tuple[Layout, str, str]] = {
  "norm1/scale": (COPY, "layer.0.layer_norm", "norm1"),
  **{
    f"attn/{x}/kernel": (DENSE, f"layer.0.SelfAttention.{x}", f"attn.{x}")
    for x in "qkvo"
  },
  "attn/positions": (
    COPY,
    "layer.0.SelfAttention.relative_attention_bias",
    "pos_embedding.embedding",
  ),
  "norm2/scale": (COPY, "layer.1.layer_norm", "norm2"),
  "ffn/gate/kernel": (DENSE, "layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
  "ffn/fc1/kernel": (DENSE, "layer.1.DenseReluDense.wi_1", "ffn.fc1"),
  "ffn/fc2/kernel": (DENSE, "layer.1.DenseReluDense.wo", "ffn.fc2"),
}


def _rules(side: int, blocks: str) -> list[Rule]:
  """Returns the table of transformers (0) or of the original (1)."""
  rules = [
    Rule(f"{names[side]}.weight", jax, layout)
    for jax, (layout, *names) in _ARRAYS.items()
  ]
  rules += [
    Rule(
      f"{blocks}.{{i}}.{names[side]}.weight",
      f"blocks/{jax}",
      layout,
      stack=True,
    )
    for jax, (layout, *names) in _BLOCK.items()
  ]
  return with_scales(rules)


LAYOUTS = {
  "transformers": _rules(0, "encoder.block"),
  "original": _rules(1, "blocks"),
}
# Other names of the token embedding, which the encoder shares with the decoder.
# Writers that drop duplicates keep any one of the names.
ALIASES = {
  "encoder.embed_tokens.weight": "shared.weight",
  "decoder.embed_tokens.weight": "shared.weight",
}
# Part of a name in llama.cpp -> in transformers, as in the tables of the
# package gguf 0.19.0 for the architecture t5encoder.
_LLAMA_CPP = {
  "token_embd": "shared",
  "enc.output_norm": "encoder.final_layer_norm",
  "output": "lm_head",
}
_LLAMA_CPP_BLOCK = {
  "attn_norm": "layer.0.layer_norm",
  "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
  **{f"attn_{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
  "ffn_norm": "layer.1.layer_norm",
  "ffn_gate": "layer.1.DenseReluDense.wi_0",
  "ffn_up": "layer.1.DenseReluDense.wi_1",
  "ffn_down": "layer.1.DenseReluDense.wo",
}
# Parameters that a whole UMT5 has besides its encoder.
IGNORED = [r"decoder\..*", r"lm_head\..*"]


def from_llama_cpp(name: str) -> str:
  """Returns the name in transformers of a tensor of a GGUF text encoder.

  Names that are not known stay as they are; those of the decoder begin with
  "decoder.".
  """
  layer, dot, end = name.rpartition(".")
  if match := re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)", layer):
    known = _LLAMA_CPP_BLOCK.get(match[2])
    return f"encoder.block.{match[1]}.{known}.{end}" if known else name
  if name.startswith("dec."):
    return "decoder." + name.removeprefix("dec.")
  return _LLAMA_CPP.get(layer, layer) + dot + end


# Field -> name in config.json, and transformers' default. transformers leaves
# out values that are the default.
_FIELDS: dict[str, tuple[str, Any]] = {
  "vocab": ("vocab_size", 250112),
  "layers": ("num_layers", 8),
  "width": ("d_model", 512),
  "heads": ("num_heads", 6),
  "head_width": ("d_kv", 64),
  "ffn_width": ("d_ff", 1024),
  "buckets": ("relative_attention_num_buckets", 32),
  "max_distance": ("relative_attention_max_distance", 128),
  "eps": ("layer_norm_epsilon", 1e-6),
}
_FEED_FORWARD = "gated-gelu"


def config_from(json: Mapping[str, Any]) -> dict[str, Any] | None:
  """Reads the fields in a config.json of transformers.

  Returns:
    The fields that `models.umt5.build` takes, or None if the config.json is
    another model's.

  Raises:
    errors.UserError: if the feed-forward is not the gated GELU.
  """
  if json.get("model_type") != "umt5":
    return None
  found = json.get("feed_forward_proj", _FEED_FORWARD)
  if found != _FEED_FORWARD:
    raise errors.UserError(
      f"config.json: feed_forward_proj is {found!r}, expected {_FEED_FORWARD!r}"
    )
  return {
    field: json.get(name, default) for field, (name, default) in _FIELDS.items()
  }


def config_to(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config.json that `UMT5EncoderModel.from_pretrained` reads."""
  return {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "feed_forward_proj": _FEED_FORWARD,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    **{
      name: fields.get(field, default)
      for field, (name, default) in _FIELDS.items()
    },
  }
