"""Joins quantised weights with their scales, which files keep side by side.

A layer's tensors become the one that a plain file has, its `weight`. The kinds
and where they are defined:

- ComfyUI's, in the form of today (`comfy_quant`, also as the metadata
  `_quantization_metadata`) and before (`scale_weight`): comfy/ops.py and
  comfy/utils.py of Comfy-Org/ComfyUI, with the arithmetic of the package
  comfy-kitchen 0.2.40 (backends/eager/quantization.py).
- musubi-tuner's `scale_weight`, also one for each block of a row.
- LightX2V's float8 and int8 (`weight_scale`) and NVFP4 (`weight_global_scale`):
  lightx2v/common/ops/mm/mm_weight.py of ModelTC/LightX2V (commit f8aee98).
- TurboDiffusion's int8 (`int8_weight`): thu-ml/TurboDiffusion (commit aaecff5).

Scales of inputs are left out, because inputs are not quantised here.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dcvideogen_jax import documents, errors
from dcvideogen_jax.convert import block_scales, quantised_tensors, reading

Tensors = Mapping[str, reading.Tensor]
# The tensors of a layer by the last part of their names.
Parts = dict[str, reading.Tensor]

FLOAT8 = (
  np.dtype(ml_dtypes.float8_e4m3fn),
  np.dtype(ml_dtypes.float8_e5m2),
)
# Characters of a layer's description; no writer needs as many.
_LONGEST = 1 << 16
# Rows and columns of TurboDiffusion's blocks.
_TURBO = 128


def join(where: str, tensors: Tensors) -> dict[str, reading.Tensor]:
  """Replaces the tensors of quantised layers by their weights.

  Tensors of formats that are not known stay as they are.

  Args:
    where: the source, for messages.
    tensors: tensors by their names in the file.

  Raises:
    errors.UserError: if scales are missing or do not fit their weights, or if a
      layer is in a format of ComfyUI that is not read.
  """
  found = dict(tensors)
  for name in tensors:
    layer, _, mark = name.rpartition(".")
    if name not in found or mark not in _FORMATS:
      continue
    form = _FORMATS[mark]
    names = {part: f"{layer}.{part}" for part in _PARTS}
    parts = {p: found[n] for p, n in names.items() if n in found}
    weight = form.read(f"{where}: {errors.brief(layer)}", parts)
    if weight is None:
      continue
    for part in form.parts:
      found.pop(names[part], None)
    found[f"{layer}.weight"] = weight
  if any(name.endswith(".scale_weight") for name in tensors):
    _leave_mark(where, found)
  return found


def _leave_mark(where: str, found: dict[str, reading.Tensor]) -> None:
  """Removes the mark of a file of scaled float8 whose scales are known."""
  for name in [n for n in found if n.rpartition(".")[2] == "scaled_fp8"]:
    del found[name]
  bare = [
    name
    for name, tensor in found.items()
    if name.endswith(".weight")
    and tensor.stored is None
    and tensor.dtype in FLOAT8
  ]
  if bare:
    warnings.warn(
      f"{where}: {len(bare)} weights in float8 have no scale and are taken as"
      f" they are, such as {errors.brief(bare[0])}",
      stacklevel=2,
    )


# --- the formats -------------------------------------------------------------


def _comfy(where: str, parts: Parts) -> reading.Tensor | None:
  """Reads a layer that ComfyUI describes."""
  description = _description(where, parts["comfy_quant"])
  name = description.get("format")
  options = description.get("params")
  both = [description, options if isinstance(options, dict) else {}]
  if not isinstance(name, str) or name not in _COMFY:
    raise _refused(where, repr(name))
  if any(x.get("convrot") for x in both):
    raise _refused(where, f"{name} with rotated inputs (convrot)")
  if "pre_quant_scale" in parts:
    raise _refused(where, f"{name} with scaled inputs (pre_quant_scale)")
  return _COMFY[name](where, parts)


def _refused(where: str, name: str) -> errors.UserError:
  return errors.UserError(
    f"{where} is quantised in ComfyUI's mixed precision, format {name}, which"
    f" is not read here: expected {', '.join(_COMFY)}"
  )


def _description(where: str, tensor: reading.Tensor) -> dict[str, Any]:
  found = None
  if math.prod(tensor.shape) * tensor.dtype.itemsize <= _LONGEST:
    try:
      found = documents.parse(tensor.read().tobytes())
    except ValueError:
      found = None
  if not isinstance(found, dict):
    raise errors.UserError(
      f"{where}.comfy_quant does not describe a format, expected a JSON object"
    )
  return found


def _comfy_float8(where: str, parts: Parts) -> reading.Tensor:
  return _scaled(where, parts, "weight", "weight_scale", FLOAT8)


def _comfy_int8(where: str, parts: Parts) -> reading.Tensor:
  return _scaled(where, parts, "weight", "weight_scale", (np.dtype(np.int8),))


def _mxfp8(where: str, parts: Parts) -> reading.Tensor:
  return block_scales.mxfp8(
    where,
    _part(where, parts, "weight", FLOAT8),
    _part(where, parts, "weight_scale", block_scales.EXPONENTS),
  )


def _nvfp4(where: str, parts: Parts) -> reading.Tensor:
  """The first number of a byte is in its high bits."""
  second = _part(where, parts, "weight_scale_2")
  return block_scales.nvfp4(
    where,
    _part(where, parts, "weight", block_scales.BYTES),
    _part(where, parts, "weight_scale", block_scales.SCALES),
    functools.partial(_number, where, second),
    high_first=True,
  )


_COMFY: dict[str, Callable[[str, Parts], reading.Tensor]] = {
  "float8_e4m3fn": _comfy_float8,
  "float8_e5m2": _comfy_float8,
  "int8_tensorwise": _comfy_int8,
  "nvfp4": _nvfp4,
  "mxfp8": _mxfp8,
}


def _lightx2v_nvfp4(where: str, parts: Parts) -> reading.Tensor | None:
  """The first number of a byte is in its low bits; scales are divided."""
  if "weight_scale" not in parts:
    return None

  def factor() -> np.float32:
    one = np.float32(1)
    if "weight_global_scale" in parts:
      return one / _number(where, parts["weight_global_scale"])
    both = (_number(where, parts[x]) for x in ("alpha", "input_global_scale"))
    return math.prod(both, start=one)

  return block_scales.nvfp4(
    where,
    _part(where, parts, "weight", block_scales.BYTES),
    _part(where, parts, "weight_scale", block_scales.SCALES),
    factor,
    high_first=False,
  )


def _alpha(where: str, parts: Parts) -> reading.Tensor | None:
  """`alpha` is a mark only beside a scale of inputs and packed numbers."""
  weight = parts.get("weight")
  if weight is None or weight.dtype not in block_scales.BYTES:
    return None
  if "input_global_scale" not in parts or "weight_global_scale" in parts:
    return None
  return _lightx2v_nvfp4(where, parts)


def _lightx2v(where: str, parts: Parts) -> reading.Tensor | None:
  """Reads a scale for each row; other weights with scales are not known."""
  others = {"comfy_quant", "weight_global_scale", "weight_scale_2", "alpha"}
  weight, scale = parts.get("weight"), parts["weight_scale"]
  if weight is None or weight.dtype not in (*FLOAT8, np.int8):
    return None
  if others & parts.keys() or not _is_number(scale.dtype):
    return None
  return _scaled(where, parts, "weight", "weight_scale", (weight.dtype,))


def _scale_weight(where: str, parts: Parts) -> reading.Tensor:
  return _scaled(where, parts, "weight", "scale_weight", FLOAT8)


def _turbo(where: str, parts: Parts) -> reading.Tensor:
  weight = _part(where, parts, "int8_weight", (np.dtype(np.int8),))
  scale = _part(where, parts, "scale")
  rows, columns = _matrix(where, weight)
  grid = (-(-rows // _TURBO), -(-columns // _TURBO))
  if scale.shape != grid:
    raise _unfit(where, "scale", scale, weight, f"of shape {grid}")
  return _blocks(weight, scale, (_TURBO, _TURBO))


class _Format(NamedTuple):
  """A format, known by the last part of a tensor's name.

  Attributes:
    read: makes the weight; None where the name means something else.
    parts: the tensors of the layer that belong to the weight.
  """

  read: Callable[[str, Parts], reading.Tensor | None]
  parts: tuple[str, ...]


_GLOBAL = (
  *("weight_scale", "weight_global_scale", "alpha"),
  *("input_global_scale", "input_absmax"),
)
_FORMATS = {
  "comfy_quant": _Format(
    _comfy, ("comfy_quant", "weight_scale", "weight_scale_2", "input_scale")
  ),
  "scale_weight": _Format(_scale_weight, ("scale_weight", "scale_input")),
  "int8_weight": _Format(_turbo, ("int8_weight", "scale")),
  "weight_global_scale": _Format(_lightx2v_nvfp4, _GLOBAL),
  "alpha": _Format(_alpha, _GLOBAL),
  "weight_scale": _Format(_lightx2v, ("weight_scale", "input_scale")),
}
_PARTS = {"weight", "pre_quant_scale"}.union(
  *(f.parts for f in _FORMATS.values())
)


# --- scales that lie in the order of their weights ---------------------------


def _scaled(
  where: str,
  parts: Parts,
  weight_name: str,
  scale_name: str,
  dtypes: tuple[np.dtype, ...],
) -> reading.Tensor:
  """Reads one scale for all, for each row, or for each block of a row."""
  weight = _part(where, parts, weight_name, dtypes)
  scale = _part(where, parts, scale_name)
  rows, columns = _matrix(where, weight)
  shape = scale.shape
  if math.prod(shape) == 1:
    block = rows, columns
  elif shape in ((rows,), (rows, 1)):
    block = 1, columns
  elif (
    len(shape) == 3
    and (shape[0], shape[2]) == (rows, 1)
    and shape[1]
    and columns % shape[1] == 0
  ):
    block = 1, columns // shape[1]
  else:
    raise _unfit(where, scale_name, scale, weight, "one, or some for each row")
  return _blocks(weight, scale, block)


def _blocks(
  weight: reading.Tensor, scale: reading.Tensor, block: tuple[int, int]
) -> reading.Tensor:
  """Makes the weight whose blocks have scales in the order of the blocks."""
  count, columns = weight.shape[0], math.prod(weight.shape[1:])
  height, width = block
  across = -(-columns // width)

  def rows(start: int, stop: int) -> quantised_tensors.Quantised:
    values = reading.some_rows(weight, start, stop).reshape(-1, columns)
    if height >= count:
      scales = scale.read().reshape(-1, across)
    else:
      first, last = start // height, -(-stop // height)
      scales = reading.some_rows(scale, first, last).reshape(-1, across)
      scales = np.repeat(scales, height, 0)[start - first * height :]
      scales = scales[: stop - start]
    return quantised_tensors.Quantised(
      values,
      scales.astype(np.float32),
      (count if height >= count else 1, width),
    )

  name = f"{weight.dtype.name} with scales"
  stored = quantised_tensors.Stored(name, weight.dtype, block, rows)
  return reading.dequantised(weight.shape, stored)


def _part(
  where: str,
  parts: Parts,
  name: str,
  dtypes: tuple[np.dtype, ...] | None = None,
) -> reading.Tensor:
  """Returns a tensor of a layer; without dtypes, it holds plain numbers."""
  if name not in parts:
    raise errors.UserError(f"{where} is quantised, but {name} is missing")
  found = parts[name].dtype
  fits = found in dtypes if dtypes else _is_number(found)
  if not fits:
    kinds = " or ".join(d.name for d in dtypes) if dtypes else "float32"
    raise errors.UserError(
      f"{where}.{name} is quantised: expected {kinds}, found {found.name}"
    )
  return parts[name]


def _is_number(dtype: np.dtype) -> bool:
  return dtype in (np.float32, np.float16, ml_dtypes.bfloat16)


def _matrix(where: str, weight: reading.Tensor) -> tuple[int, int]:
  if len(weight.shape) < 2 or not math.prod(weight.shape):
    raise errors.UserError(
      f"{where} is quantised: expected a matrix, found shape {weight.shape}"
    )
  return weight.shape[0], math.prod(weight.shape[1:])


def _unfit(where, name, scale, weight, expected) -> errors.UserError:
  return errors.UserError(
    f"{where}.{name} has shape {scale.shape}, which does not fit weights of"
    f" shape {weight.shape}: expected {expected}"
  )


def _number(where: str, tensor: reading.Tensor) -> np.float32:
  if math.prod(tensor.shape) != 1:
    raise errors.UserError(
      f"{where}: expected one scale for all, found shape {tensor.shape}"
    )
  return np.float32(tensor.read().reshape(())[()])
