"""Names of Wan 2.1's transformer and its config.json, in both layouts.

"diffusers" is `WanTransformer3DModel` (diffusers 0.42), "original" the
`WanModel` of Wan-Video/Wan2.1 (commit 9737cba) and of DC-VideoGen's trainer.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.convert.naming import (
  CONV3D,
  Rule,
  linear,
  norm,
  with_scales,
)
from dcvideogen_jax.models import fields as model_fields

# Channels of the CLIP in Wan's own code, and its number of tokens for two
# images.
_IMAGE_WIDTH, _IMAGE_POSITIONS = 1280, 514
# Channels of a head in every released Wan 2.1 model; weights do not tell them.
_HEAD_WIDTH = 128
# The scale of positions in both libraries. Neither knows the keys "rope_scale"
# and "chunk": if a config.json has one, they warn that they ignore it, and
# compute other values.
_ROPE_SCALE = (1, 1, 1)


# Names of the parts of diffusers' `condition_embedder`.
_TEXT, _TIME, _IMAGE = (
  f"condition_embedder.{x}_embedder" for x in ("text", "time", "image")
)


class _Names(NamedTuple):
  """Tables of JAX name -> name in diffusers, name in the original."""

  linear: dict[str, tuple[str, str]]
  norms: dict[str, tuple[str, str]]
  norms_without_bias: dict[str, tuple[str, str]]
  arrays: dict[str, tuple[str, str]]


_ENDS = _Names(
  {
    "text_embed/linear_1": (f"{_TEXT}.linear_1", "text_embedding.0"),
    "text_embed/linear_2": (f"{_TEXT}.linear_2", "text_embedding.2"),
    "time_embed/linear_1": (f"{_TIME}.linear_1", "time_embedding.0"),
    "time_embed/linear_2": (f"{_TIME}.linear_2", "time_embedding.2"),
    "time_proj": ("condition_embedder.time_proj", "time_projection.1"),
    "image_embed/linear_1": (f"{_IMAGE}.ff.net.0.proj", "img_emb.proj.1"),
    "image_embed/linear_2": (f"{_IMAGE}.ff.net.2", "img_emb.proj.3"),
    "head": ("proj_out", "head.head"),
  },
  {
    "image_embed/norm1": (f"{_IMAGE}.norm1", "img_emb.proj.0"),
    "image_embed/norm2": (f"{_IMAGE}.norm2", "img_emb.proj.4"),
  },
  {},
  {
    "image_embed/positions": (f"{_IMAGE}.pos_embed", "img_emb.emb_pos"),
    "head_modulation": ("scale_shift_table", "head.modulation"),
  },
)
_BLOCK = _Names(
  {
    **{
      f"{ours}/{x}": (f"{theirs}.to_{y}", f"{ours}.{x}")
      for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
      for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out.0"))
    },
    "cross_attn/k_img": ("attn2.add_k_proj", "cross_attn.k_img"),
    "cross_attn/v_img": ("attn2.add_v_proj", "cross_attn.v_img"),
    "ffn/linear_1": ("ffn.net.0.proj", "ffn.0"),
    "ffn/linear_2": ("ffn.net.2", "ffn.2"),
  },
  {"norm3": ("norm2", "norm3")},
  {
    "self_attn/norm_q": ("attn1.norm_q", "self_attn.norm_q"),
    "self_attn/norm_k": ("attn1.norm_k", "self_attn.norm_k"),
    "cross_attn/norm_q": ("attn2.norm_q", "cross_attn.norm_q"),
    "cross_attn/norm_k": ("attn2.norm_k", "cross_attn.norm_k"),
    "cross_attn/norm_k_img": ("attn2.norm_added_k", "cross_attn.norm_k_img"),
  },
  {"modulation": ("scale_shift_table", "modulation")},
)


def _rules(side: int) -> list[Rule]:
  """Returns the table of diffusers (0) or of the original (1)."""
  rules = linear("patch_embedding", "patch_embed", CONV3D)
  for names, torch, jax in (
    (_ENDS, "", ""),
    (_BLOCK, "blocks.{i}.", "blocks/"),
  ):
    stack = names is _BLOCK
    for name, theirs in names.linear.items():
      rules += linear(torch + theirs[side], jax + name, stack=stack)
    for name, theirs in names.norms.items():
      rules += norm(torch + theirs[side], jax + name, stack=stack)
    for name, theirs in names.norms_without_bias.items():
      rules += norm(torch + theirs[side], jax + name, stack=stack)[:1]
    for name, theirs in names.arrays.items():
      rules.append(Rule(torch + theirs[side], jax + name, stack=stack))
  return with_scales(rules)


LAYOUTS = {"diffusers": _rules(0), "original": _rules(1)}
# Some tools store the rotary tables, which are computed here.
IGNORED = [r"(rope\.)?freqs(_cos|_sin)?"]


def config_from(json: Mapping[str, Any]) -> dict[str, Any] | None:
  """Reads the fields in a config.json of diffusers or of the original.

  Returns:
    The fields that `models.wan_dit.build` takes and checks, or None if the
    config.json is another model's.

  Raises:
    errors.UserError: if a value is missing, or if the model has parts that the
      model here lacks.
    ValueError: if the number or the size of heads is not a count.
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


# Field -> names in the config.json of diffusers and of the original.
_FIELDS = {
  "layers": ("num_layers", "num_layers"),
  "ffn_width": ("ffn_dim", "ffn_dim"),
  "in_channels": ("in_channels", "in_dim"),
  "out_channels": ("out_channels", "out_dim"),
  "patch": ("patch_size", "patch_size"),
  "text_width": ("text_dim", "text_dim"),
  "frequencies": ("freq_dim", "freq_dim"),
  "eps": ("eps", "eps"),
}
_ADDED = {"rope_scale": _ROPE_SCALE, "chunk": None}
# Values of the fields that a config.json may leave out.
_DEFAULTS = {"eps": 1e-6, **_ADDED}


def _read(json: Mapping[str, Any], side: int) -> dict[str, Any]:
  """Reads the fields that both libraries have, and those that neither has."""
  fields = {ours: json[names[side]] for ours, names in _FIELDS.items()}
  return {**fields, **{name: json[name] for name in _ADDED}}


def _written(fields: Mapping[str, Any], side: int) -> dict[str, Any]:
  """Returns a config.json's values for the fields that `_read` reads.

  Fields that neither library has are left out if they have their defaults.
  """
  found = {names[side]: fields[ours] for ours, names in _FIELDS.items()}
  found["patch_size"] = [*fields["patch"]]
  scale = tuple(fields.get("rope_scale", _ROPE_SCALE))
  if scale != _ROPE_SCALE:
    found["rope_scale"] = [*scale]
  if fields.get("chunk") is not None:
    found["chunk"] = fields["chunk"]
  return found


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
  out = json.get("out_channels") or json["in_channels"]
  return {
    **_read({**_DEFAULTS, **json, "out_channels": out}, 0),
    "width": width,
    "heads": heads,
    "image_width": json.get("image_dim"),
    "image_positions": json.get("pos_embed_seq_len"),
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
  defaults = {**_DEFAULTS, "patch_size": (1, 2, 2), "text_dim": 4096}
  return {
    **_read({**defaults, **json}, 1),
    "width": json["dim"],
    "heads": json["num_heads"],
    "image_width": None if kind == "t2v" else _IMAGE_WIDTH,
    "image_positions": _IMAGE_POSITIONS if kind == "flf2v" else None,
  }


def config_to(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config.json with which diffusers builds the same model."""
  image = fields["image_width"]
  return {
    "_class_name": "WanTransformer3DModel",
    **_written(fields, 0),
    "added_kv_proj_dim": None if image is None else fields["width"],
    "attention_head_dim": fields["width"] // fields["heads"],
    "cross_attn_norm": True,
    "image_dim": image,
    "num_attention_heads": fields["heads"],
    "pos_embed_seq_len": fields["image_positions"],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
  }


def _to_original(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config.json with which Wan's own code builds the same model.

  Raises:
    errors.UserError: if the model's image features are not those of the CLIP in
      Wan's own code.
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
    **_written(fields, 1),
    "dim": fields["width"],
    "model_type": kinds[image],
    "num_heads": fields["heads"],
    "text_len": 512,
  }


# Layout -> function that makes the config.json of its library.
CONFIGS = {"diffusers": config_to, "original": _to_original}


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
  """Infers the fields from the shapes of the parameters.

  Shapes do not tell the size of heads and eps; these are taken to be 128 and
  1e-6, as in every released Wan 2.1 model.

  Args:
    shapes: JAX name -> shape.

  Returns:
    The fields that `models.wan_dit.build` takes, or None if a parameter is
    missing or the width is not a multiple of 128.
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
