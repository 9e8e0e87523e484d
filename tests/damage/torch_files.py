"""Files as `torch.save` writes them, without torch."""

import io
import pathlib
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
  np.dtype(np.float64): "DoubleStorage",
  np.dtype(np.float32): "FloatStorage",
  np.dtype(np.float16): "HalfStorage",
  np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
  np.dtype(np.int64): "LongStorage",
  np.dtype(np.int8): "CharStorage",
}


class _Named:
  """An object of torch, which is known by its name alone."""

  def __init__(self, module: str, name: str):
    self.text = f"c{module}\n{name}\n".encode()

  def __call__(self):
    raise TypeError("it only stands for something")


class _Pickler(pickle._Pickler):
  """Numpy's arrays become tensors; their bytes go elsewhere."""

  dispatch = dict(pickle._Pickler.dispatch)

  def __init__(self, file):
    super().__init__(file, protocol=2)
    self.storages: list[bytes] = []

  def persistent_id(self, obj):
    if not isinstance(obj, _Storage):
      return None
    self.storages.append(obj.array.tobytes())
    kind = _Named("torch", _STORAGES[obj.array.dtype])
    return "storage", kind, str(len(self.storages) - 1), "cpu", obj.array.size

  def save_array(self, array):
    steps = np.array(array.strides) // array.itemsize
    rebuild = _Named("torch._utils", "_rebuild_tensor_v2")
    fields = (0, array.shape, tuple(map(int, steps)), False, {})
    self.save_reduce(rebuild, (_Storage(array), *fields), obj=array)

  def save_named(self, named):
    self.write(named.text)

  dispatch[np.ndarray] = save_array
  dispatch[_Named] = save_named


class _Storage:
  def __init__(self, array: np.ndarray):
    self.array = array


def write(path: pathlib.Path, document: Any) -> None:
  """Writes what dictionaries, texts, numbers and arrays are made of."""
  pickled = io.BytesIO()
  pickler = _Pickler(pickled)
  pickler.dump(document)
  with zipfile.ZipFile(path, "w") as archive:

    def add(name, content):
      archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)

    add("data.pkl", pickled.getvalue())
    add("byteorder", "little")
    for number, storage in enumerate(pickler.storages):
      add(f"data/{number}", storage)
    add("version", "3\n")
