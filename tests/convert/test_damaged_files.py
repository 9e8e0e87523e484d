"""Damaged or absurd files are refused with one sentence."""

import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import sources
from tests.convert import checkpoints

# --- safetensors -------------------------------------------------------------


def write(path, header, data=b"", length=None):
  """Writes a file with this header, which is bytes or an object."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  path.write_bytes(struct.pack("<Q", length) + text + data)
  return path


def entry(first, last, shape=(2,), dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
  ("header", "message"),
  [
    ({"a": entry(-8, 0), "b": entry(0, 8)}, "a has no data_offsets of two who"),
    ({"a": entry(0, 8), "b": entry(4, 12)}, "b begins at 4, which overlaps"),
    ({"a": entry(0, 8), "b": entry(12, 20)}, "b begins at 12, which leaves"),
    ({"a": entry(0, 8)}, "8 bytes follow the last tensor"),
    ({"a": entry(0, 8), "b": entry(8, 24, (4,))}, "b ends outside the file"),
    ({"a": entry(0.0, 8.0), "b": entry(8, 16)}, "a has no data_offsets of"),
    ({"a": entry(0, 8), "b": entry(False, 8)}, "b has no data_offsets of two"),
    ({"a": entry(0, 16, (4.0,))}, "a has no shape of whole numbers"),
    ({"a": entry(0, 16, (-2, -2))}, "a has no shape of whole numbers"),
    ({"a": entry(0, 16, (True, 4))}, "a has no shape of whole numbers"),
    ({"a": entry(0, 16, 4)}, "a has no shape of whole numbers"),
    ({"a": entry(0, 0, (0, 10**12, 10**12))}, "a has no shape of whole numb"),
    ({"a": entry(0, 16, (3,))}, "a has 16 bytes, which is not what F32 and"),
    ({"a": entry(0, 16, (4,), "F31")}, "a has dtype 'F31', which is not known"),
    (
      {"a": entry(0, 16, (4,), ["F32"])},
      r"a has dtype \['F32'\], which is not",
    ),
    ({"a": [0, 16]}, "the entry of a is no object"),
    ({"x" * 5000: [0, 16]}, r"entry of x+\.\.\.x+ \(5000 characters\) is no"),
    (b'{"a": {}, "a": {}}', "it has 'a' twice"),
    (b"[" * 100_000, "it is nested too deep"),
    (b'"a table"', "its header is no table"),
    (b"\xff\xfe\x00", "can't decode"),
  ],
)
def test_headers_that_do_not_describe_the_file(tmp_path, header, message):
  path = write(tmp_path / "x.safetensors", header, b"\0" * 16)
  with pytest.raises(errors.UserError, match=message) as caught:
    sources.open_source(path)
  told = str(caught.value)
  assert told.startswith(f"{path} is not a whole safetensors file: ")
  assert "\n" not in told and len(told) < 500 + len(str(path))


@pytest.mark.parametrize("length", [1 << 63, 100_000_001, 41])
def test_headers_that_are_too_long(tmp_path, length):
  path = write(tmp_path / "x.safetensors", {}, length=length)
  with path.open("r+b") as file:  # A sparse file of the claimed size.
    file.truncate(min(length, 100_000_001) + 8 - (length == 41))
  with pytest.raises(errors.UserError, match=r"its header (has|is longer)"):
    sources.open_source(path)


NARROW = {
  "I8": np.int8,
  "I16": np.int16,
  "U16": np.uint16,
  "U32": np.uint32,
  "U64": np.uint64,
  "F8_E8M0": ml_dtypes.float8_e8m0fnu,
  "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
  "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
  "C64": np.complex64,
}


@pytest.mark.parametrize("name", NARROW)
def test_every_dtype_of_the_format_is_known(tmp_path, name):
  """Otherwise a quantised file would be refused as a damaged container."""
  x = np.array([[1, 2], [3, 4], [5, 6]]).astype(NARROW[name])
  header = {"x": entry(0, x.nbytes, x.shape, name)}
  path = write(tmp_path / "x.safetensors", header, x.tobytes())
  found = sources.open_source(path)["x"]
  assert found.dtype == x.dtype
  np.testing.assert_array_equal(found.read(), x)


@pytest.mark.parametrize(("name", "bits"), [("F4", 4), ("F6_E2M3", 6)])
def test_packed_dtypes_are_listed_and_not_read(tmp_path, name, bits):
  header = {"x": entry(0, bits, (4, 2), name)}
  path = write(tmp_path / "x.safetensors", header, b"\0" * bits)
  found = sources.open_source(path)["x"]
  assert found.shape == (4, 2) and found.dtype.itemsize == 1
  with pytest.raises(errors.UserError, match="x is packed float"):
    found.read()


@pytest.mark.parametrize(
  ("start", "message"),
  [
    (b"GGUF\3\0\0\0", "is not a whole GGUF file"),
    (b"version https://git-lfs.github.com/spec/v1\n", "pointer that Git LFS"),
    (b"<!DOCTYPE html><html>", "is a web page"),
  ],
)
@pytest.mark.parametrize("suffix", [".gguf", ".safetensors", ".pth"])
def test_what_is_no_file_of_weights_is_named(tmp_path, start, message, suffix):
  (tmp_path / f"x{suffix}").write_bytes(start + b" " * 100)
  for source in (tmp_path, tmp_path / f"x{suffix}"):
    with pytest.raises(errors.UserError, match=message):
      sources.open_source(source)


# --- indices and names -------------------------------------------------------


@pytest.mark.parametrize(
  ("listed", "message"),
  [
    (
      "m.safetensors.index.json",
      "'m.safetensors.index.json' is no name of a f",
    ),
    ("..", "'..' is no name of a file"),
    ("", "'' is no name of a file"),
    ("config.json", "'config.json' is no name of a file"),
    ("/etc/x.safetensors", "is no name of a file"),
    ("x" * 5000 + ".safetensors", "of which 1 are missing: x"),
  ],
)
def test_indices_that_list_what_is_no_shard(tmp_path, listed, message):
  index = tmp_path / "m.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"a": listed}}))
  with pytest.raises(errors.UserError, match=message) as caught:
    sources.open_source(tmp_path)
  assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
  "name", ["config.json", "diffusion_pytorch_model.safetensors.index.json"]
)
@pytest.mark.parametrize(
  "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"a": 1, "a": 2}']
)
def test_json_that_no_parser_likes(tmp_path, name, text):
  checkpoints.write_sharded(tmp_path, checkpoints.random_weights(), 1)
  (tmp_path / name).write_text(text)
  with pytest.raises(errors.UserError, match=name):
    convert.load("wan_dit", tmp_path)


def test_names_of_thousands_of_characters(tmp_path):
  weights = checkpoints.random_weights() | {"y" * 5000: np.ones(2, np.float32)}
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(weights, path)
  with pytest.raises(errors.UserError, match=r"\(5000 characters\)") as caught:
    convert.load("wan_dit", path, checkpoints.MODELS["t2v"])
  assert len(str(caught.value)) < 1000
  with pytest.raises(errors.UserError, match="no file or directory"):
    convert.load("wan_dit", "z" * 5000)


# --- pickles -----------------------------------------------------------------


class Call:
  """Pickles to a call of a function of torch by its name."""

  def __init__(self, name, *arguments):
    self.call = (name, arguments)


class Storage:
  """Pickles to a reference to bytes in the archive."""

  def __init__(self, count, kind="FloatStorage", key="0"):
    self.pid = ("storage", Call(kind), key, "cpu", count)


def pt(path, value, data=b"\0" * 64):
  """Writes a file in torch's format, with content that torch never writes."""
  out = [b"\x80\x02"]

  def put(x):
    if isinstance(x, Call):
      name, arguments = x.call
      module = "torch" if name[0] != "_" else "torch._utils"
      out.append(f"c{module}\n{name}\n".encode())
      if arguments:
        put(arguments)
        out.append(b"R")
    elif isinstance(x, Storage):
      put(x.pid)
      out.append(b"Q")
    elif isinstance(x, tuple):
      out.append(b"(")
      for each in x:
        put(each)
      out.append(b"t")
    elif isinstance(x, dict):
      out.append(b"}(")
      for each in x.items():
        put(each[0])
        put(each[1])
      out.append(b"u")
    else:
      out.append(pickle.dumps(x, 2)[2:-1])

  put(value)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", b"".join([*out, b"."]))
    archive.writestr("x/byteorder", "little")
    archive.writestr("x/data/0", data)
  return path


def view(offset, shape, strides, storage=None):
  storage = storage or Storage(16)
  return Call("_rebuild_tensor_v2", storage, offset, shape, strides, False, {})


@pytest.mark.parametrize(
  ("tensor", "message"),
  [
    # The strides lead far outside the storage; only their sum stays inside.
    (view(0, (2, 2), (-1000, 1001)), "not whole numbers of 0 or more"),
    (view(-4, (2,), (1,)), "not whole numbers of 0 or more"),
    (view(0, (-2, -2), (1, 1)), "not whole numbers of 0 or more"),
    (view(0, (2.0,), (1,)), "not whole numbers of 0 or more"),
    (view(0, (2,), (1.0,)), "not whole numbers of 0 or more"),
    (view(0.0, (2,), (1,)), "not whole numbers of 0 or more"),
    (view(True, (2,), (1,)), "not whole numbers of 0 or more"),
    (view(0, "ab", (1, 1)), "not whole numbers of 0 or more"),
    (view(0, (2, 2), (1,)), "not whole numbers of 0 or more"),
    (view(0, (1 << 40, 1 << 40), (0, 0)), "not whole numbers of 0 or more"),
    (view(0, (17,), (1,)), "reaches outside its storage"),
    (view(15, (2,), (1,)), "reaches outside its storage"),
    (view(0, (2, 2), (1, 15)), "reaches outside its storage"),
    (view(0, (2,), (1,), Storage(-1)), "a storage has no size"),
    (view(0, (2,), (1,), Storage(17)), "x/data/0 has 64 bytes, expected 68"),
    (view(0, (2,), (1,), Storage(15)), "x/data/0 has 64 bytes, expected 60"),
    (view(0, (2,), (1,), Storage(16, "HalfStorage")), "64 bytes, expected 32"),
    (view(0, (2,), (1,), Storage(2, key="7")), "KeyError"),
    (view(0, (2,), (1,), "FloatStorage"), "a tensor has no storage"),
    (Call("_rebuild_tensor_v2"), "'x' is not|no tensors with names"),
  ],
)
def test_tensors_outside_their_storage(tmp_path, tensor, message):
  path = pt(tmp_path / "x.pt", {"x": tensor})
  with pytest.raises(errors.UserError, match=message):
    sources.open_source(path)["x"].read()


def test_signs_beside_the_storage_are_not_lost(tmp_path):
  """torch.save of `torch._neg_view(x)` or of a part of a conjugate."""
  _, plain = view(0, (2,), (1,)).call
  tensor = Call("_rebuild_tensor_v2", *plain, {"neg": True})
  path = pt(tmp_path / "x.pt", {"x": tensor})
  with pytest.raises(errors.UserError, match=r"x\.pt holds a tensor .*neg"):
    sources.open_source(path)


def test_files_that_repeat_a_name_are_both_named(tmp_path):
  for name in ("model.fp16", "model"):
    array = {"x": np.zeros(2, np.float32)}
    safetensors.numpy.save_file(array, tmp_path / f"{name}.safetensors")
  with pytest.raises(errors.UserError, match="repeats x of model.fp16.safe"):
    sources.open_source(tmp_path)


def test_views_cannot_be_written_through(tmp_path):
  """Elements may overlap: a write to one would change the others."""
  data = np.arange(16, dtype=np.float32)
  content = {"x": view(1, (3, 2), (1, 4)), "y": view(2, (3,), (0,))}
  path = pt(tmp_path / "x.pt", content, data.tobytes())
  opened = sources.open_source(path)
  x, y = opened["x"].read(), opened["y"].read()
  np.testing.assert_array_equal(x, [[1, 5], [2, 6], [3, 7]])
  np.testing.assert_array_equal(y, [2, 2, 2])
  assert not x.flags.writeable and not y.flags.writeable


def test_a_file_that_is_gone_when_it_is_read(tmp_path):
  path = pt(tmp_path / "x.pt", {"x": view(0, (4,), (1,))})
  tensor = sources.open_source(path)["x"]
  path.unlink()
  with pytest.raises(errors.UserError, match=f"cannot read {path}: No such"):
    tensor.read()


def nested(depth, leaf):
  for _ in range(depth):
    leaf = {"a": leaf, "b": 1}
  return leaf


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (nested(40, view(0, (2,), (1,))), "nested more than 16 deep"),
    ({("a", 1): view(0, (2,), (1,))}, "a key that is no text"),
    ({1: view(0, (2,), (1,)), "1": view(0, (2,), (1,))}, "holds 1 twice"),
    ({"a": 1, "b": "text"}, "holds no tensors with names"),
    (view(0, (2,), (1,)), "expected a dictionary of tensors, found tensor"),
    ({"ema_model_state_dict": {"x": 3}}, "ema_model_state_dict is no dict"),
  ],
)
def test_pickles_that_hold_no_weights(tmp_path, content, message):
  path = pt(tmp_path / "x.pt", content)
  with pytest.raises(errors.UserError, match=message) as caught:
    sources.open_source(path)
  assert str(path) in str(caught.value)


def test_pickles_that_are_no_pickles(tmp_path):
  """Whatever exception a damaged pickle causes, it becomes one sentence."""
  path = tmp_path / "x.pt"
  content = {"x": view(0, (4,), (1,)), "y": view(0, (2, 2), (1, 2))}
  whole = pt(path, content).read_bytes()
  start = whole.index(b"x/data.pkl") + len(b"x/data.pkl")
  end = whole.index(b"PK", start)
  random = np.random.default_rng(0)
  read = 0
  for _ in range(300):
    damaged = bytearray(whole)
    for at in random.integers(start, end, 2):
      damaged[at] = random.integers(256)
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("x/data.pkl", bytes(damaged[start:end]))
      archive.writestr("x/data/0", b"\0" * 64)
    try:
      for tensor in sources.open_source(path).values():
        tensor.read()
      read += 1
    except errors.UserError as e:
      assert str(path) in str(e)
  assert read < 150
