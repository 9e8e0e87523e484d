"""Names of Wan 2.1's transformer and its config.json, in both layouts.

"diffusers" is `WanTransformer3DModel` (diffusers 0.42), "original" the
`WanModel` of Wan-Video/Wan2.1 (commit 9737cba) and of DC-VideoGen's trainer.
"""

import math
from collections.abc import Mapping
from typing import Any

from dcvideogen_jax import errors
from dcvideogen_jax.convert.engine import CONV3D, COPY, DENSE, Layout, Rule
from dcvideogen_jax.models import fields as model_fields

# Of the CLIP that Wan's own code builds in, and its tokens for two images.
_IMAGE_WIDTH, _IMAGE_POSITIONS = 1280, 514
# Of one head, in every released Wan 2.1 model; what weights do not tell.
_HEAD_WIDTH = 128
# What neither library knows: "rope_scale" where it is not this, and "chunk".
# Both say that they ignore the key, and they are right to warn: they compute
# something else.
_ROPE_SCALE = (1, 1, 1)


def _dense(torch: str, jax: str, layout: Layout = DENSE, stack=False):
  return [
    Rule(f"{torch}.weight", f"{jax}/kernel", layout, stack),
    Rule(f"{torch}.bias", f"{jax}/bias", COPY, stack),
  ]


def _norm(torch: str, jax: str, stack=False, bias=True) -> list[Rule]:
  rules = [
    Rule(f"{torch}.weight", f"{jax}/scale", COPY, stack),
    Rule(f"{torch}.bias", f"{jax}/bias", COPY, stack),
  ]
  return rules if bias else rules[:1]


# Modules by our name -> names in diffusers, in the original.
_DENSE = {
  "text_embed/linear_1": (
    "condition_embedder.text_embedder.linear_1",
    "text_embedding.0",
  ),
  "text_embed/linear_2": (
    "condition_embedder.text_embedder.linear_2",
    "text_embedding.2",
  ),
  "time_embed/linear_1": (
    "condition_embedder.time_embedder.linear_1",
    "time_embedding.0",
  ),
  "time_embed/linear_2": (
    "condition_embedder.time_embedder.linear_2",
    "time_embedding.2",
  ),
  "time_proj": ("condition_embedder.time_proj", "time_projection.1"),
  "image_embed/linear_1": (
    "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.1",
  ),
  "image_embed/linear_2": (
    "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.3",
  ),
  "head": ("proj_out", "head.head"),
}
_NORMS = {
  "image_embed/norm1": (
    "condition_embedder.image_embedder.norm1",
    "img_emb.proj.0",
  ),
  "image_embed/norm2": (
    "condition_embedder.image_embedder.norm2",
    "img_emb.proj.4",
  ),
}
_ARRAYS = {
  "image_embed/positions": (
    "condition_embedder.image_embedder.pos_embed",
    "img_emb.emb_pos",
  ),
  "head_modulation": ("scale_shift_table", "head.modulation"),
}
# The same inside a block.
_BLOCK_DENSE = {
  **{
    f"self_attn/{x}": (f"attn1.to_{y}", f"self_attn.{x}")
    for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out.0"))
  },
  **{
    f"cross_attn/{x}": (f"attn2.to_{y}", f"cross_attn.{x}")
    for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out.0"))
  },
  "cross_attn/k_img": ("attn2.add_k_proj", "cross_attn.k_img"),
  "cross_attn/v_img": ("attn2.add_v_proj", "cross_attn.v_img"),
  "ffn/linear_1": ("ffn.net.0.proj", "ffn.0"),
  "ffn/linear_2": ("ffn.net.2", "ffn.2"),
}
_BLOCK_RMS = {
  "self_attn/norm_q": ("attn1.norm_q", "self_attn.norm_q"),
  "self_attn/norm_k": ("attn1.norm_k", "self_attn.norm_k"),
  "cross_attn/norm_q": ("attn2.norm_q", "cross_attn.norm_q"),
  "cross_attn/norm_k": ("attn2.norm_k", "cross_attn.norm_k"),
  "cross_attn/norm_k_img": ("attn2.norm_added_k", "cross_attn.norm_k_img"),
}
_BLOCK_NORMS = {"norm3": ("norm2", "norm3")}
_BLOCK_ARRAYS = {"modulation": ("scale_shift_table", "modulation")}


def _rules(side: int) -> list[Rule]:
  """The table of diffusers (0) or of the original (1)."""
  rules = _dense("patch_embedding", "patch_embed", CONV3D)
  for jax, torch in _DENSE.items():
    rules += _dense(torch[side], jax)
  for jax, torch in _NORMS.items():
    rules += _norm(torch[side], jax)
  for jax, torch in _ARRAYS.items():
    rules.append(Rule(torch[side], jax))
  for jax, torch in _BLOCK_DENSE.items():
    rules += _dense(f"blocks.{{i}}.{torch[side]}", f"blocks/{jax}", stack=True)
  for jax, torch in _BLOCK_RMS.items():
    name = f"blocks.{{i}}.{torch[side]}"
    rules += _norm(name, f"blocks/{jax}", stack=True, bias=False)
  for jax, torch in _BLOCK_NORMS.items():
    rules += _norm(f"blocks.{{i}}.{torch[side]}", f"blocks/{jax}", stack=True)
  for jax, torch in _BLOCK_ARRAYS.items():
    name = f"blocks.{{i}}.{torch[side]}"
    rules.append(Rule(name, f"blocks/{jax}", COPY, stack=True))
  return rules


LAYOUTS = {"diffusers": _rules(0), "original": _rules(1)}
# Rotary tables that some tools store; they are computed here.
IGNORED = [r"(rope\.)?freqs(_cos|_sin)?"]


def config_from(json: Mapping[str, Any]) -> dict[str, Any] | None:
  """Fields from the config.json of diffusers or of the original.

  Returns:
    What `models.wan_dit.build` takes and checks, or None if this is another
    model's.

  Raises:
    errors.UserError: if the model has parts that ours lacks, or a value is
      missing.
    ValueError: if its heads are no numbers.
  """
  readers = {
    "WanTransformer3DModel": _from_diffusers,
    "WanModel": _from_original,
  }
  name = json.get("_class_name")
  if not isinstance(name, str) or name not in readers:
    return None
  try:
    return readers[name](json)
  except KeyError as e:
    raise errors.UserError(
      f"the config.json of a {name} is incomplete: {e!r}"
    ) from e


def _require(json: Mapping[str, Any], **needed: tuple[Any, ...]) -> None:
  for name, values in needed.items():
    if name in json and json[name] not in values:
      raise errors.UserError(
        f"config.json: {name} is {json[name]!r}, expected {values[0]!r}"
      )


def _from_diffusers(json: Mapping[str, Any]) -> dict[str, Any]:
  _require(
    json,
    qk_norm=("rms_norm_across_heads",),
    cross_attn_norm=(True,),
  )
  for name in ("num_attention_heads", "attention_head_dim"):
    model_fields.count(name, json[name])
  heads = json["num_attention_heads"]
  width = heads * json["attention_head_dim"]
  _require(json, added_kv_proj_dim=(width, None))
  return {
    "layers": json["num_layers"],
    "width": width,
    "heads": heads,
    "ffn_width": json["ffn_dim"],
    "in_channels": json["in_channels"],
    "out_channels": json.get("out_channels") or json["in_channels"],
    "patch": json["patch_size"],
    "text_width": json["text_dim"],
    "image_width": json.get("image_dim"),
    "image_positions": json.get("pos_embed_seq_len"),
    "frequencies": json["freq_dim"],
    "eps": json.get("eps", 1e-6),
    "rope_scale": json.get("rope_scale", _ROPE_SCALE),
    "chunk": json.get("chunk"),
  }


def _from_original(json: Mapping[str, Any]) -> dict[str, Any]:
  _require(
    json,
    model_type=("t2v", "i2v", "flf2v"),
    qk_norm=(True,),
    cross_attn_norm=(True,),
    window_size=((-1, -1), [-1, -1]),
  )
  kind = json["model_type"]
  return {
    "layers": json["num_layers"],
    "width": json["dim"],
    "heads": json["num_heads"],
    "ffn_width": json["ffn_dim"],
    "in_channels": json["in_dim"],
    "out_channels": json["out_dim"],
    "patch": json.get("patch_size", (1, 2, 2)),
    "text_width": json.get("text_dim", 4096),
    "image_width": None if kind == "t2v" else _IMAGE_WIDTH,
    "image_positions": _IMAGE_POSITIONS if kind == "flf2v" else None,
    "frequencies": json["freq_dim"],
    "eps": json.get("eps", 1e-6),
    "rope_scale": json.get("rope_scale", _ROPE_SCALE),
    "chunk": json.get("chunk"),
  }


def config_to(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json with which diffusers builds the same model."""
  image = fields["image_width"]
  return {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None if image is None else fields["width"],
    "attention_head_dim": fields["width"] // fields["heads"],
    "cross_attn_norm": True,
    "eps": fields["eps"],
    "ffn_dim": fields["ffn_width"],
    "freq_dim": fields["frequencies"],
    "image_dim": image,
    "in_channels": fields["in_channels"],
    "num_attention_heads": fields["heads"],
    "num_layers": fields["layers"],
    "out_channels": fields["out_channels"],
    "patch_size": [*fields["patch"]],
    "pos_embed_seq_len": fields["image_positions"],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": fields["text_width"],
    **_ours(fields),
  }


def _to_original(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json with which Wan's own code builds the same model.

  Raises:
    errors.UserError: if that code cannot: its image features are CLIP's.
  """
  image = (fields["image_width"], fields["image_positions"])
  kinds = {
    (None, None): "t2v",
    (_IMAGE_WIDTH, None): "i2v",
    (_IMAGE_WIDTH, _IMAGE_POSITIONS): "flf2v",
  }
  if image not in kinds:
    raise errors.UserError(
      f"the original layout has image features of {_IMAGE_WIDTH} channels and,"
      f" for two images, {_IMAGE_POSITIONS} positions, found {image}"
    )
  return {
    "_class_name": "WanModel",
    "dim": fields["width"],
    "eps": fields["eps"],
    "ffn_dim": fields["ffn_width"],
    "freq_dim": fields["frequencies"],
    "in_dim": fields["in_channels"],
    "model_type": kinds[image],
    "num_heads": fields["heads"],
    "num_layers": fields["layers"],
    "out_dim": fields["out_channels"],
    "patch_size": [*fields["patch"]],
    "text_dim": fields["text_width"],
    "text_len": 512,
    **_ours(fields),
  }


def _ours(fields: Mapping[str, Any]) -> dict[str, Any]:
  scale = tuple(fields.get("rope_scale", _ROPE_SCALE))
  found: dict[str, Any] = {}
  if scale != _ROPE_SCALE:
    found["rope_scale"] = [*scale]
  if fields.get("chunk") is not None:
    found["chunk"] = fields["chunk"]
  return found


# What is written beside the weights, by layout.
CONFIGS = {"diffusers": config_to, "original": _to_original}


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
  """Fields from the shapes of the parameters.

  What shapes do not tell is as in every released Wan 2.1 model: heads of 128
  channels and eps 1e-6.

  Args:
    shapes: by our names.

  Returns:
    What `models.wan_dit.build` takes, or None where that cannot be right: a
    parameter is missing or the width is no multiple of 128.
  """
  try:
    *patch, in_channels, width = shapes["patch_embed/kernel"]
    layers, _, ffn_width = shapes["blocks/ffn/linear_1/kernel"]
    image_norm = shapes.get("image_embed/norm1/scale")
    positions = shapes.get("image_embed/positions")
    fields = {
      "layers": layers,
      "width": width,
      "heads": width // _HEAD_WIDTH,
      "ffn_width": ffn_width,
      "in_channels": in_channels,
      "out_channels": shapes["head/kernel"][-1] // math.prod(patch),
      "patch": tuple(patch),
      "text_width": shapes["text_embed/linear_1/kernel"][0],
      "image_width": image_norm and image_norm[0],
      "image_positions": positions and positions[1],
      "frequencies": shapes["time_embed/linear_1/kernel"][0],
    }
  except (KeyError, ValueError, IndexError):
    return None
  return None if width % _HEAD_WIDTH else fields
