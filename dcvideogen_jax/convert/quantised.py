"""Refuses quantised weights that are not read, and names their format.

A quantised weight without its scale has other values, so quantised weights are
never loaded as plain ones. `gguf_files` and `quantised_layers` read the formats
that are known; this module finds the weights that they leave. Plain casts to
float8 have no scales and pass.
"""

import re
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import documents, errors
from dcvideogen_jax.convert import reading

Tensors = Mapping[str, reading.Tensor]

_EXPECTED = (
  "which is not read here: expected weights in float32, bfloat16 or float16,"
  " cast to float8 without scales, or in a format that docs/weights.md lists"
)
# Patterns of the names of tensors beside quantised weights -> the format, as
# messages call it. The first match counts.
_MARKS = {
  re.compile(pattern): what
  for pattern, what in {
    r".*\.comfy_quant": "in ComfyUI's mixed precision",
    r".*\.int8_weight": "to int8 as TurboDiffusion does it",
    r"(.*\.)?scaled_fp8|.*\.scale_weight": (
      "to scaled fp8 as ComfyUI and musubi-tuner do it"
    ),
    r".*\.(weight_global_scale|weight_scale_2|input_absmax)": "to NVFP4",
    r".*\.weight_scale_inv": "to fp8 with scales of blocks",
    r".*\.weight_packed": "as compressed-tensors does it",
    r".*\.weight_scale": "to {dtype} with scales",
    r".*\.(SCB|weight_format)|.*\.weight\.(nested_)?(absmax|quant_map)": (
      "by bitsandbytes"
    ),
    r".*\.weight\.quant_state\..*": "by bitsandbytes",
    r".*\.weight\._(data|scale|shift)(\..*)?": "by optimum-quanto",
    r".*_qdata": "by torchao",
    r".*\.(wscales|wtscale|smooth_factor)": "by Nunchaku (SVDQuant)",
    r".*\.(qweight|qzeros|g_idx|scales)": "in groups, as by GPTQ, AWQ or MLX",
    r".*\.W_q": "by HQQ",
    r".*\.(input_scale|pre_quant_scale)": "with scales of inputs",
  }.items()
}
_DTYPES = {"uint8": "4 bits (NVFP4 or MXFP4)", "int8": "int8"}
# Python packages whose classes a pickle may ask for -> what it then holds.
_MODULES = {
  "torchao": "weights quantised by torchao",
  "bitsandbytes": "weights quantised by bitsandbytes",
  "optimum": "weights quantised by optimum-quanto",
  "hqq": "weights quantised by HQQ",
}


def require_plain(where: str, tensors: Tensors) -> None:
  """Refuses weights with the marks of a quantised format.

  Args:
    where: the source, for the message.
    tensors: tensors by name, after `quantised_layers.join` has taken the marks
      of the formats that are read.

  Raises:
    errors.UserError: names the format of the quantised weights.
  """
  for mark, what in _MARKS.items():
    name = next((n for n in tensors if mark.fullmatch(n)), None)
    if name is not None:
      weight = tensors.get(re.sub(r"_scale$", "", name))
      dtype = weight.dtype.name if weight else "few bits"
      what = what.format(dtype=_DTYPES.get(dtype, dtype))
      if name.endswith(".comfy_quant"):
        what += _comfy_format(tensors[name])
      raise errors.UserError(
        f"{where} is quantised {what} ({errors.brief(name)}), {_EXPECTED}"
      )


def require_floats(
  where: str, tensors: Tensors, names: Collection[str]
) -> None:
  """Refuses weights whose dtype is not a plain floating-point one.

  Args:
    where: the source, for the message.
    tensors: tensors by name.
    names: names of the tensors to check, as far as `tensors` has them.

  Raises:
    errors.UserError: names a tensor of integers or of a packed dtype.
  """
  for name in names:
    if name in tensors and not _is_plain(tensors[name].dtype):
      raise errors.UserError(
        f"{where}: {errors.brief(name)} holds {tensors[name].dtype.name},"
        f" quantised in a form that is not known, {_EXPECTED}"
      )


def hint(module: str, name: str) -> str:
  """Returns what a pickle that asks for a class probably holds, or ""."""
  if name == "_rebuild_qtensor":
    return ": it has weights quantised by PyTorch, " + _EXPECTED
  if what := _MODULES.get(module.partition(".")[0]):
    return f": it has {what}, {_EXPECTED}"
  if module.startswith("torch.distributed"):
    return ": it has shards (DTensor), expected whole tensors"
  return ""


def _is_plain(dtype: np.dtype) -> bool:
  if dtype.name.startswith(("float8_e8", "float6_", "float4_")):
    return False
  return jnp.issubdtype(dtype, jnp.floating)


def _comfy_format(tensor: reading.Tensor) -> str:
  """Returns the format that ComfyUI stores in a tensor as JSON text, or ""."""
  try:
    return f", format {documents.parse(tensor.read().tobytes())['format']}"
  except (ValueError, KeyError, TypeError):
    return ""
