"""Names of CLIP's vision tower and its config.json, in every layout.

"transformers" has the names of `CLIPVisionModel` that all versions of
transformers read and those before 5 write; "transformers5" lacks their prefix;
"original" is `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth` of
Wan-Video/Wan2.1 (commit 9737cba), which fuses q, k and v.
"""

from collections.abc import Mapping
from typing import Any

from dcvideogen_jax import errors
from dcvideogen_jax.convert.naming import CONV2D, Layout, Rule, linear, norm


def _transformers(prefix: str) -> list[Rule]:
  embeddings = f"{prefix}embeddings"
  block = f"{prefix}encoder.layers.{{i}}"
  rules = [
    Rule(f"{embeddings}.class_embedding", "class_embedding"),
    Rule(f"{embeddings}.position_embedding.weight", "position_embedding"),
    Rule(f"{embeddings}.patch_embedding.weight", "patch_embedding", CONV2D),
    # transformers misspells this name.
    *norm(f"{prefix}pre_layrnorm", "pre_norm"),
    *norm(f"{prefix}post_layernorm", "post_norm"),
    *norm(f"{block}.layer_norm1", "blocks/norm1", stack=True),
    *norm(f"{block}.layer_norm2", "blocks/norm2", stack=True),
    *linear(f"{block}.self_attn.out_proj", "blocks/attn/o", stack=True),
    *linear(f"{block}.mlp.fc1", "blocks/fc1", stack=True),
    *linear(f"{block}.mlp.fc2", "blocks/fc2", stack=True),
  ]
  for i, x in enumerate("qkv"):
    name = f"{block}.self_attn.{x}_proj"
    rules += linear(name, "blocks/attn/qkv", stack=True, part=(i, 3))
  return rules


def _original() -> list[Rule]:
  block = "visual.transformer.{i}"
  one, two = (
    Layout(None, squeezed_axes=(0,)),
    Layout(None, squeezed_axes=(0, 1)),
  )
  return [
    Rule("visual.cls_embedding", "class_embedding", two),
    Rule("visual.pos_embedding", "position_embedding", one),
    Rule("visual.patch_embedding.weight", "patch_embedding", CONV2D),
    *norm("visual.pre_norm", "pre_norm"),
    *norm("visual.post_norm", "post_norm"),
    *norm(f"{block}.norm1", "blocks/norm1", stack=True),
    *norm(f"{block}.norm2", "blocks/norm2", stack=True),
    *linear(f"{block}.attn.to_qkv", "blocks/attn/qkv", stack=True),
    *linear(f"{block}.attn.proj", "blocks/attn/o", stack=True),
    *linear(f"{block}.mlp.0", "blocks/fc1", stack=True),
    *linear(f"{block}.mlp.2", "blocks/fc2", stack=True),
  ]


LAYOUTS = {
  "transformers": _transformers("vision_model."),
  "transformers5": _transformers(""),
  "original": _original(),
}
# Position indices, projections into the space shared with text, text tower.
IGNORED = [
  r"(vision_model\.)?embeddings\.position_ids",
  r"visual_projection\.weight",
  r"(text_model|text_projection)\..*",
  r"logit_scale",
  r"visual\.head",
  r"textual\..*",
  r"log_scale",
]

# Field -> name in config.json, and transformers' default. transformers leaves
# out values that are the default.
_FIELDS: dict[str, tuple[str, Any]] = {
  "image_size": ("image_size", 224),
  "patch": ("patch_size", 32),
  "layers": ("num_hidden_layers", 12),
  "width": ("hidden_size", 768),
  "heads": ("num_attention_heads", 12),
  "ffn_width": ("intermediate_size", 3072),
  "eps": ("layer_norm_eps", 1e-5),
}


def config_from(json: Mapping[str, Any]) -> dict[str, Any] | None:
  """Reads the fields in a config.json of transformers, of a tower or a CLIP.

  Returns:
    The fields that `models.clip_vision.build` takes, or None if the config.json
    is another model's.

  Raises:
    errors.UserError: if the nonlinearity is not the exact GELU.
  """
  if json.get("model_type") == "clip":
    json = json.get("vision_config", {})
  elif json.get("model_type") != "clip_vision_model":
    return None
  found = json.get("hidden_act", "quick_gelu")
  if found != "gelu":
    raise errors.UserError(
      f"config.json: hidden_act is {found!r}, expected 'gelu' as in ViT-H/14"
    )
  return {
    field: json.get(name, default) for field, (name, default) in _FIELDS.items()
  }


def config_to(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config.json that `CLIPVisionModel.from_pretrained` reads."""
  return {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_act": "gelu",
    "num_channels": 3,
    **{
      name: fields.get(field, default)
      for field, (name, default) in _FIELDS.items()
    },
  }
