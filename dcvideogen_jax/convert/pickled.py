"""Reads the tensors of a `.pt` file, or a TorchScript archive, without torch.

A pickle is a program. The pickle of a checkpoint needs no more than
dictionaries of tensors and a trainer's settings. The unpickler here builds the
dictionaries, replaces the objects of settings by blanks, and refuses everything
else.
"""

import collections
import io
import itertools
import math
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.convert import nested, quantised, reading, tensor_files

# torch's dtypes by name; torch and numpy use the same names.
_DTYPES = {
  dtype.name: dtype
  for name, dtype in tensor_files.DTYPES.items()
  if name not in tensor_files.PACKED_BITS
} | {"complex128": np.dtype(np.complex128)}
# torch's classes of storages -> name of the dtype.
_STORAGES = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "ComplexFloatStorage": "complex64",
  "ComplexDoubleStorage": "complex128",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "BoolStorage": "bool",
  "UntypedStorage": "uint8",  # Its bytes; each tensor states its own dtype.
}
# Modules with the classes of settings that trainers store beside weights.
_SETTINGS = (
  "argparse",
  "collections",
  "enum",
  "lightning",
  "lightning_fabric",
  "numpy",
  "omegaconf",
  "pathlib",
  "pytorch_lightning",
  "typing",
)
_BUILT_IN = ("dict", "list", "set", "frozenset", "tuple", "int", "float", "str")
# What TorchScript marks the types of its modules' attributes with.
_SCRIPT_LISTS = (
  "build_boollist",
  "build_doublelist",
  "build_intlist",
  "build_tensorlist",
  "restore_type_tag",
)
# Bytes of the longest pickle that is read; a 14B model's has less than 1 MB.
_LONGEST = 1 << 27


class _Storage(NamedTuple):
  """A flat array inside the archive.

  Attributes:
    dtype: a key of `_DTYPES`.
    bytes: its size.
    read: dtype -> reader of its elements.
  """

  dtype: str
  bytes: int
  read: Callable[[np.dtype], reading.Elements]


class _Blank:
  """Replaces an object of a trainer's settings and discards its contents."""

  __slots__ = ()

  def __new__(cls, *_, **__):
    return object.__new__(cls)

  def __setstate__(self, state):
    pass

  def __setitem__(self, key, value):
    pass

  def append(self, value):
    pass

  def extend(self, values):
    pass

  def add(self, value):
    pass


class _Module(dict):
  """Replaces a module of a TorchScript archive by its attributes.

  The code of the archive lies in other members and is not read.
  """

  def __setstate__(self, state):
    self.update(state)


def _rebuild_tensor(storage, offset, shape, strides, dtype):
  """Makes a tensor that is a view of a storage, after checking its bounds."""
  if not isinstance(storage, _Storage):
    raise ValueError("a tensor has no storage")
  dtype = _DTYPES[dtype or storage.dtype]
  if not (
    reading.is_shape(shape)
    and reading.are_counts(strides)
    and reading.are_counts([offset])
    and len(shape) == len(strides)
  ):
    raise ValueError(
      "a tensor's offset, shape and strides are not whole numbers of 0 or more"
    )
  shape, empty = tuple(shape), not math.prod(shape)
  needed = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if not empty and (offset + needed) * dtype.itemsize > storage.bytes:
    raise ValueError("a tensor reaches outside its storage")
  stored = storage.read(dtype)
  products = itertools.accumulate(shape[:0:-1], lambda a, b: a * b, initial=1)
  row_major = tuple(products)[::-1][: len(shape)]
  if empty or all(
    n == 1 or s == r for n, s, r in zip(shape, strides, row_major, strict=True)
  ):

    def elements(start, stop, memory=None):
      return stored(offset + start, offset + stop, memory)

    return reading.tensor(shape, dtype, elements)

  def read():
    flat = stored(offset, offset + needed, None)
    steps = [s * dtype.itemsize for s in strides]
    # numpy's as_strided does not support float8 and does not check bounds.
    array = np.ndarray(shape, dtype, flat, strides=steps)
    array.flags.writeable = False
    return array

  return reading.Tensor(shape, dtype, read)


class _WeightsUnpickler(pickle.Unpickler):
  """Builds dictionaries of tensors and refuses anything that may run code."""

  def __init__(self, file, path, storage):
    super().__init__(file)
    self._path = path
    self._storage = storage

  def find_class(self, module, name):
    if module == "torch" and name in _DTYPES:
      return name
    if module in ("torch", "torch.storage") and name in _STORAGES:
      return _STORAGES[name]
    # A pickle can modify what it gets: the functions are new for each file, and
    # the attributes of OrderedDict, a built-in type, cannot be set.
    allowed = {
      ("torch._utils", "_rebuild_tensor_v2"): lambda *x: self._tensor(
        *x[:4], None, x[6:]
      ),
      ("torch._utils", "_rebuild_tensor_v3"): lambda *x: self._tensor(
        *x[:4], x[6], x[7:]
      ),
      ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
      ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
      ("torch", "Size"): lambda *x: tuple(*x),
      ("torch", "device"): lambda *x: None,
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("collections", "defaultdict"): lambda *x: {},
      ("_codecs", "encode"): lambda *x: None,
    }
    if module in ("builtins", "__builtin__") and name in _BUILT_IN:
      module = "typing"
    if (module, name) in allowed:
      return allowed[module, name]
    if module.partition(".")[0] == "__torch__":
      return type("Module", (_Module,), {})
    if module == "torch.jit._pickle" and name in _SCRIPT_LISTS:
      return lambda values, *_: values
    if module.partition(".")[0] in _SETTINGS:
      return type("Blank", (_Blank,), {"__slots__": ()})
    raise errors.UserError(
      f"{self._path} was refused: it asks for {module}.{name}, and a checkpoint"
      f" of weights holds tensors only{quantised.hint(module, name)}"
    )

  def _tensor(self, storage, offset, shape, strides, dtype, bits):
    """Makes a tensor, unless it has torch's "neg" or "conj" `bits`.

    torch applies these bits when the tensor is used, not in its storage.
    """
    if any(bits):
      raise errors.UserError(
        f"{self._path} holds a tensor that torch negates or conjugates when it "
        f"is used ({errors.brief(str(bits[0]))}): save its resolve_neg() or "
        "resolve_conj()"
      )
    return _rebuild_tensor(storage, offset, shape, strides, dtype)

  def persistent_load(self, pid):
    _, dtype, key, _, count = pid
    return self._storage(dtype, str(key), count)


def open_torch(path: pathlib.Path) -> dict[str, reading.Tensor]:
  """Lists the tensors of a file that `torch.save` wrote.

  `nested.state_dict` finds the weights among what trainers store beside them.

  Raises:
    errors.UserError: if the file is damaged or holds more than tensors and
      settings.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      loaded = _unpickle(path, archive)
  except errors.UserError:
    raise
  except zipfile.BadZipFile as e:
    raise errors.UserError(
      f"{path} is truncated or not a PyTorch checkpoint "
      f"(the zip format of torch.save since 1.6): {e}"
    ) from e
  # A damaged pickle is an arbitrary program, which may raise any exception.
  except Exception as e:
    reason = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
    raise errors.UserError(
      f"{path} is damaged or not a readable checkpoint: {errors.brief(reason)}"
    ) from e
  return nested.state_dict(path, loaded)


def _unpickle(path: pathlib.Path, archive: zipfile.ZipFile) -> Any:
  members = {info.filename: info for info in archive.infolist()}
  pickles = [name for name in members if name.endswith("/data.pkl")]
  if len(pickles) != 1:
    raise ValueError(f"it has {len(pickles)} files data.pkl, expected one")
  root = pickles[0].removesuffix("data.pkl")
  if members[pickles[0]].file_size > _LONGEST:
    raise ValueError(f"its data.pkl is longer than {_LONGEST} bytes")
  size = path.stat().st_size

  def storage(dtype, key, count):
    if type(count) is not int or count < 0:
      raise ValueError("a storage has no size")
    info = members[f"{root}data/{key}"]
    if info.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f"{info.filename} is compressed")
    stored = count * _DTYPES[dtype].itemsize
    offset = _data_offset(path, info)
    if info.file_size != stored or offset + stored > size:
      raise ValueError(
        f"{info.filename} has {info.file_size} bytes, expected {stored}"
      )
    return _Storage(
      dtype, stored, lambda kind: reading.reader(path, offset, kind)
    )

  order = members.get(f"{root}byteorder")
  if order and (order.file_size > 9 or archive.read(order) != b"little"):
    raise ValueError("it is big-endian")
  pickled = archive.read(pickles[0])
  check_memo(pickled)
  return _WeightsUnpickler(io.BytesIO(pickled), path, storage).load()


def check_memo(pickled: bytes) -> None:
  """Raises ValueError for an index of the memo that no pickle needs.

  Python allocates a memo as long as the largest index, however few objects it
  holds: a single damaged byte can make it allocate 64 GB.
  """
  for opcode, place, _ in pickletools.genops(pickled):
    if "PUT" in opcode.name and int(place or 0) > len(pickled):
      raise ValueError("it numbers more objects than it holds")


def _data_offset(path: pathlib.Path, info: zipfile.ZipInfo) -> int:
  """Returns the offset of a member's first byte of data in the archive."""
  with path.open("rb") as file:
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
  return info.header_offset + 30 + name + extra
