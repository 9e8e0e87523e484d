"""Names of the Wan 2.1 autoencoder and its config.json, in both layouts.

"diffusers" is `AutoencoderKLWan` (diffusers 0.42), "original" is
`Wan2.1_VAE.pth` of Wan-Video/Wan2.1 (commit 9737cba). The original numbers the
decoder's blocks consecutively over all levels, so its table is for one number
of blocks per level, that of the released model.
"""

from collections.abc import Mapping
from typing import Any

from dcvideogen_jax import errors
from dcvideogen_jax.convert.naming import CONV2D, CONV3D, Layout, Rule

_GAMMA3D = Layout(None, squeezed_axes=(1, 2, 3))
_GAMMA2D = Layout(None, squeezed_axes=(1, 2))

# Levels of the decoder in the original layout, and residual blocks per level.
_LEVELS = 4
_BLOCKS = 3

# Layers of a residual block: JAX name -> layout, names in diffusers and in the
# original.
_RES_BLOCK = {
  "norm1": (_GAMMA3D, "norm1", "residual.0"),
  "conv1": (CONV3D, "conv1", "residual.2"),
  "norm2": (_GAMMA3D, "norm2", "residual.3"),
  "conv2": (CONV3D, "conv2", "residual.6"),
  "shortcut": (CONV3D, "conv_shortcut", "shortcut"),
}
_ATTENTION = {
  "norm": (_GAMMA2D, "norm", "norm"),
  "to_qkv": (CONV2D, "to_qkv", "to_qkv"),
  "proj": (CONV2D, "proj", "proj"),
}
_RESAMPLE = {
  "resample": (CONV2D, "resample.1", "resample.1"),
  "time_conv": (CONV3D, "time_conv", "time_conv"),
}
# Layers that encoder and decoder have besides their blocks, in the same form.
_ENDS = {
  "conv_in": (CONV3D, "conv_in", "conv1"),
  "norm_out": (_GAMMA3D, "norm_out", "head.0"),
  "conv_out": (CONV3D, "conv_out", "head.2"),
}
_QUANT = {
  "quant_conv": (CONV3D, "quant_conv", "conv1"),
  "post_quant_conv": (CONV3D, "post_quant_conv", "conv2"),
}
_MIDDLE = [
  ("resnets_0", _RES_BLOCK, "mid_block.resnets.0", "middle.0"),
  ("attention", _ATTENTION, "mid_block.attentions.0", "middle.1"),
  ("resnets_1", _RES_BLOCK, "mid_block.resnets.1", "middle.2"),
]


def _rules(table: Mapping, side: int, torch: str = "", jax: str = ""):
  """Returns the rules of a table for diffusers (0) or for the original (1)."""
  rules = []
  for name, (layout, *names) in table.items():
    module = f"{torch}{names[side]}"
    if layout in (_GAMMA2D, _GAMMA3D):
      rules.append(Rule(f"{module}.gamma", f"{jax}{name}/scale", layout))
      continue
    rules.append(Rule(f"{module}.weight", f"{jax}{name}/kernel", layout))
    rules.append(Rule(f"{module}.bias", f"{jax}{name}/bias"))
  return rules


def _half(half: str, side: int) -> list[Rule]:
  rules = _rules(_ENDS, side, f"{half}.", f"{half}/")
  for name, table, *names in _MIDDLE:
    torch = f"{half}.{names[side]}."
    rules += _rules(table, side, torch, f"{half}/mid_block/{name}/")
  return rules


def _down_blocks(side: int) -> list[Rule]:
  torch = ("encoder.down_blocks.{i}.", "encoder.downsamples.{i}.")[side]
  table = {**_RES_BLOCK, **_RESAMPLE}
  return _rules(table, side, torch, "encoder/down_blocks_{i}/")


def _up_blocks_diffusers() -> list[Rule]:
  torch, jax = "decoder.up_blocks.{i}.", "decoder/up_blocks_{i}/"
  return [
    *_rules(_RES_BLOCK, 0, torch + "resnets.{j}.", jax + "resnets_{j}/"),
    *_rules(_RESAMPLE, 0, torch + "upsamplers.0.", jax + "upsampler/"),
  ]


def _up_blocks_original() -> list[Rule]:
  rules = []
  for level in range(_LEVELS):
    jax = f"decoder/up_blocks_{level}/"
    first = level * (_BLOCKS + 1)
    for j in range(_BLOCKS):
      rules += _rules(
        _RES_BLOCK, 1, f"decoder.upsamples.{first + j}.", f"{jax}resnets_{j}/"
      )
    rules += _rules(
      _RESAMPLE, 1, f"decoder.upsamples.{first + _BLOCKS}.", f"{jax}upsampler/"
    )
  return rules


def _layout(side: int) -> list[Rule]:
  return [
    *_half("encoder", side),
    *_down_blocks(side),
    *_rules(_QUANT, side),
    *_half("decoder", side),
    *(_up_blocks_original() if side else _up_blocks_diffusers()),
  ]


LAYOUTS = {"diffusers": _layout(0), "original": _layout(1)}
IGNORED: list[str] = []

# Field -> name in the config.json of diffusers.
_FIELDS = {
  "latent_channels": "z_dim",
  "base_width": "base_dim",
  "multipliers": "dim_mult",
  "blocks": "num_res_blocks",
  "temporal": "temperal_downsample",
  "mean": "latents_mean",
  "std": "latents_std",
}
# Values that the model here requires; older files have only the first.
_FIXED = {
  "attn_scales": [],
  "in_channels": 3,
  "out_channels": 3,
  "is_residual": False,
  "patch_size": None,
}


def config_from(json: Mapping[str, Any]) -> dict[str, Any] | None:
  """Reads the fields in a config.json of diffusers.

  Returns:
    The fields that `models.wan_vae.build` takes, or None if the config.json is
    another model's.

  Raises:
    errors.UserError: if a value is missing, or if the model has parts that the
      model here lacks, as Wan 2.2's has.
  """
  if json.get("_class_name") != "AutoencoderKLWan":
    return None
  if missing := [name for name in _FIELDS.values() if name not in json]:
    raise errors.UserError(
      f"the config.json of an AutoencoderKLWan lacks {', '.join(missing)}"
    )
  fixed = {**_FIXED, "decoder_base_dim": json["base_dim"]}
  for name, expected in fixed.items():
    found = json.get(name, expected)
    if found != expected and (name, found) != ("decoder_base_dim", None):
      raise errors.UserError(
        f"config.json: {name} is {found!r}, expected {expected!r} as in Wan 2.1"
      )
  return {ours: json[theirs] for ours, theirs in _FIELDS.items()}


def config_to(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config.json with which diffusers builds the same model."""
  values = {theirs: fields[ours] for ours, theirs in _FIELDS.items()}
  lists = {k: [*v] for k, v in values.items() if isinstance(v, tuple | list)}
  return {
    "_class_name": "AutoencoderKLWan",
    **values,
    **lists,
    **_FIXED,
    "dropout": 0.0,
    "scale_factor_spatial": 2 ** len(fields["temporal"]),
    "scale_factor_temporal": 2 ** sum(fields["temporal"]),
  }
