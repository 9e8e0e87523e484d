"""Reads the header of a `.safetensors` file, and checks it.

The rules are those of the format: tensors lie one after another, without gaps
or overlaps, and fill the file to its end.
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dcvideogen_jax import documents, errors
from dcvideogen_jax.convert import reading

# Names of dtypes in the header, as in safetensors 0.8.
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
  "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
  "F6_E2M3": np.dtype(ml_dtypes.float6_e2m3fn),
  "F6_E3M2": np.dtype(ml_dtypes.float6_e3m2fn),
  "F4": np.dtype(ml_dtypes.float4_e2m1fn),
  "C64": np.dtype(np.complex64),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bits per element of packed dtypes, whose elements are not whole bytes.
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

# Metadata in which ComfyUI describes quantised layers.
_QUANTISATION = "_quantization_metadata"
# Bytes of the longest header that the safetensors library reads.
_LONGEST_HEADER = 100_000_000


def read_header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
  """Returns the header of a file and the offset of its data in bytes.

  Raises:
    errors.UserError: if the file cannot be read or its header is damaged.
  """
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      start = file.read(8)
      length = int.from_bytes(start, "little")
      if len(start) < 8 or length > size - 8:
        raise ValueError("its header is longer than the file")
      if length > _LONGEST_HEADER:
        raise ValueError(
          f"its header has {length} bytes, more than {_LONGEST_HEADER}"
        )
      header = documents.parse(file.read(length))
    if not isinstance(header, dict):
      raise ValueError("its header is no table of tensors")
  except ValueError as e:
    raise _damaged(path, e) from e
  except OSError as e:
    raise errors.UserError(f"cannot read {path}: {e.strerror or e}") from e
  return header, 8 + length


def open_safetensors(path: pathlib.Path) -> dict[str, reading.Tensor]:
  """Lists the tensors of a `.safetensors` file.

  Raises:
    errors.UserError: if the header is damaged or does not describe the file.
  """
  header, start = read_header(path)
  metadata = header.pop("__metadata__", None)
  tensors: dict[str, reading.Tensor] = {}
  ends = []
  try:
    for name, entry in header.items():
      where = errors.brief(name)
      dtype, shape, (first, last) = _entry(where, entry)
      ends.append((first, last, where))
      if entry["dtype"] in PACKED_BITS:
        tensors[name] = _packed(path, where, shape, dtype)
        continue
      elements = reading.reader(path, start + first, dtype)
      tensors[name] = reading.tensor(shape, dtype, elements)
    _check_order(ends, os.path.getsize(path) - start)
    tensors.update(_descriptions(metadata, tensors))
  except ValueError as e:
    raise _damaged(path, e) from e
  return tensors


def _descriptions(
  metadata: Any, tensors: Mapping[str, reading.Tensor]
) -> dict[str, reading.Tensor]:
  """Returns ComfyUI's descriptions of quantised layers, as tensors beside them.

  Newer files hold them as metadata, with or without the prefix of the names.
  """
  text = metadata.get(_QUANTISATION) if isinstance(metadata, dict) else None
  if text is None:
    return {}
  try:
    layers = {**documents.parse(text.encode())["layers"]}
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise ValueError(f"its {_QUANTISATION} describes no layers") from e
  known = {name.removesuffix(".weight") for name in tensors}
  ends = {layer.split(".", n)[-1]: layer for layer in known for n in (1, 2, 3)}
  found = {}
  for layer, described in layers.items():
    name = layer if layer in known else ends.get(layer)
    if name is not None and f"{name}.comfy_quant" not in tensors:
      content = np.frombuffer(json.dumps(described).encode(), np.uint8)
      found[f"{name}.comfy_quant"] = reading.Tensor(
        content.shape, content.dtype, functools.partial(np.array, content)
      )
  return found


def _damaged(path: pathlib.Path, e: ValueError) -> errors.UserError:
  return errors.UserError(f"{path} is not a whole safetensors file: {e}")


def _entry(
  name: str, entry: Any
) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
  """Checks the header's entry of a tensor.

  Returns:
    Its dtype, its shape, and its first and last byte, the last not included.
  """
  if not isinstance(entry, Mapping):
    raise ValueError(f"the entry of {name} is no object")
  kind, shape = entry.get("dtype"), entry.get("shape")
  offsets = entry.get("data_offsets")
  if not isinstance(kind, str) or kind not in DTYPES:
    raise ValueError(f"{name} has dtype {kind!r}, which is not known")
  if not reading.is_shape(shape):
    raise ValueError(f"{name} has no shape of whole numbers")
  if not reading.are_counts(offsets) or len(offsets) != 2:
    raise ValueError(f"{name} has no data_offsets of two whole numbers")
  first, last = offsets
  bits = math.prod(shape) * PACKED_BITS.get(kind, 8 * DTYPES[kind].itemsize)
  if 8 * (last - first) != bits:
    raise ValueError(
      f"{name} has {last - first} bytes, which is not what {kind} and its"
      " shape take"
    )
  return DTYPES[kind], tuple(shape), (first, last)


def _packed(
  path: pathlib.Path, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> reading.Tensor:
  """Makes a tensor of packed elements, which is listed but cannot be read."""

  def read():
    raise errors.UserError(
      f"{path}: {name} is packed {dtype.name}, which is not read here"
    )

  return reading.Tensor(shape, dtype, read)


def _check_order(ends: list[tuple[int, int, str]], size: int) -> None:
  """Raises ValueError unless tensors fill `size` bytes without gaps."""
  at = 0
  for first, last, name in sorted(ends):
    if first != at:
      what = "overlaps the one before" if first < at else "leaves a gap"
      raise ValueError(f"{name} begins at {first}, which {what} ({at})")
    at = last
  if at > size:
    raise ValueError(f"{ends and max(ends)[2]} ends outside the file")
  if at < size:
    raise ValueError(f"{size - at} bytes follow the last tensor")
