"""Files, indices and directories are read, and damage is reported."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import errors
from dcvideogen_jax.convert import sources
from tests.convert import checkpoints

STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def values():
  return checkpoints.state_dict("wan_dit", checkpoints.T2V, "diffusers")


def read(source, *patterns):
  opened = sources.open_source(source, patterns)
  return {name: tensor.read() for name, tensor in opened.items()}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("by_index", [False, True])
def test_sharded_files(tmp_path, values, count, by_index):
  index = checkpoints.write_sharded(tmp_path, values, count)
  checkpoints.assert_same(read(index if by_index else tmp_path), values)


def test_rows_are_those_of_the_tensor(tmp_path, values):
  opened = sources.open_source(checkpoints.write_sharded(tmp_path, values, 2))
  name = "blocks.1.ffn.net.0.proj.weight"
  np.testing.assert_array_equal(opened[name].rows(5, 11), values[name][5:11])


def test_tensors_that_begin_late_in_a_large_file(tmp_path):
  """A sparse file: the tensor follows a gigabyte of another one."""
  size = 1 << 30
  header = json.dumps(
    {
      "a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
      "b": {"dtype": "I32", "shape": [1], "data_offsets": [size, size + 4]},
    }
  ).encode()
  path = tmp_path / "model.safetensors"
  with path.open("wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    file.seek(size, 1)
    file.write((7).to_bytes(4, "little"))
  opened = sources.open_source(path, ())
  assert opened["a"].shape == (size,)
  np.testing.assert_array_equal(opened["b"].read(), [7])


def test_an_index_wins_over_single_files(tmp_path, values):
  checkpoints.write_sharded(tmp_path, values, 2)
  other = {"something.else": np.ones(3, np.float32)}
  safetensors.numpy.save_file(other, tmp_path / "other.safetensors")
  checkpoints.assert_same(read(tmp_path), values)


def rewrite(index, change):
  document = json.loads(index.read_text())
  change(document["weight_map"])
  index.write_text(json.dumps(document))


def missing_shard(index):
  (index.parent / f"{STEM}-00002-of-00003.safetensors").unlink()


def lost_tensor(index):
  def change(where):
    where["blocks.7.attn1.to_q.weight"] = f"{STEM}-00001-of-00003.safetensors"

  rewrite(index, change)


def unlisted_tensor(index):
  rewrite(index, lambda where: where.pop("proj_out.bias"))


def moved_tensor(index):
  def change(where):
    first = f"{STEM}-00001-of-00003.safetensors"
    second = f"{STEM}-00002-of-00003.safetensors"
    where["proj_out.bias"] = (
      second if where["proj_out.bias"] == first else first
    )

  rewrite(index, change)


def truncated_shard(index):
  path = index.parent / f"{STEM}-00003-of-00003.safetensors"
  path.write_bytes(path.read_bytes()[:-7])


def escaping_shard(index):
  rewrite(index, lambda where: where.update(x="../x.safetensors"))


def no_index(index):
  index.write_text("[1, 2]")


def no_text(index):
  content = index.read_bytes()
  index.write_bytes(content[:88] + b"\xff" + content[89:])


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (missing_shard, r"lists 3 files, of which 1 are missing: .*-00002-of"),
    (
      lost_tensor,
      r"do not hold them: blocks\.7\.attn1\.to_q\.weight in .*1-of",
    ),
    (unlisted_tensor, r"does not list 1 tensors of its files: proj_out\.bias"),
    (moved_tensor, r"files that do not hold them: proj_out\.bias in"),
    (truncated_shard, r"-00003-of-00003\.safetensors is not a whole"),
    (escaping_shard, r"'\.\./x\.safetensors' is no name of a file"),
    (no_index, r"is not an index of weights"),
    (no_text, r"is not an index of weights: .*can't decode byte 0xff"),
  ],
)
def test_damaged_sharded_checkpoints(tmp_path, values, damage, message):
  index = checkpoints.write_sharded(tmp_path, values, 3)
  damage(index)
  with pytest.raises(errors.UserError, match=message) as caught:
    sources.open_source(tmp_path)
  assert len(str(caught.value)) < len(str(tmp_path)) + 400


def test_a_file_that_shrinks_after_opening(tmp_path, values):
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(values, path)
  opened = sources.open_source(path)
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(errors.UserError, match="truncated"):
    for tensor in opened.values():
      tensor.read()


@pytest.mark.parity
def test_models_side_by_side_are_told_by_their_names(tmp_path, values):
  """The original Wan's repository has several models in one directory."""
  import torch

  checkpoints.write_sharded(tmp_path, values, 2)
  for name, value in (("Wan2.1_VAE.pth", 1), ("models_t5_umt5-xxl.pth", 2)):
    torch.save({"w": torch.full((3,), float(value))}, tmp_path / name)
  checkpoints.assert_same(read(tmp_path, f"{STEM}*.safetensors*"), values)
  assert read(tmp_path, "Wan2.1_VAE*.pth")["w"][0] == 1
  assert read(tmp_path, "models_t5_*.pth")["w"][0] == 2


@pytest.mark.parametrize(
  ("files", "message"),
  [
    (("a.index.json", "b.index.json"), "several checkpoints, name one: a.ind"),
    (("a.pth", "b.pt"), "several checkpoints, name one: a.pth, b.pt"),
    (("vae/x.safetensors", "readme.txt"), "its folders vae do: name one"),
  ],
)
def test_directories_that_do_not_say_which(tmp_path, files, message):
  for name in files:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
  with pytest.raises(errors.UserError, match=message):
    sources.open_source(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize(
  "dtype", [ml_dtypes.float8_e4m3fn, np.float16, np.int64, np.bool_]
)
def test_dtypes_of_safetensors(tmp_path, dtype):
  import safetensors.torch
  import torch

  random = np.random.default_rng(0)
  x = random.integers(0, 2, (3, 4)).astype(np.float32)
  kind = {"float8_e4m3fn": torch.float8_e4m3fn}.get(np.dtype(dtype).name)
  kind = kind or torch.from_numpy(x.astype(dtype)).dtype
  file = tmp_path / "x.safetensors"
  safetensors.torch.save_file({"x": torch.from_numpy(x).to(kind)}, file)
  found = read(file)["x"]
  assert found.dtype == dtype
  np.testing.assert_array_equal(found.astype(np.float32), x)


# --- trainers' files ---------------------------------------------------------


def save(path, value):
  import torch

  def tensors(x):
    if isinstance(x, dict):
      return {key: tensors(v) for key, v in x.items()}
    return torch.from_numpy(x.copy())

  torch.save(tensors(value), path)


ONE, TWO = np.float32([1, 2]), np.float32([3, 4, 5])


@pytest.mark.parity
@pytest.mark.parametrize(
  ("content", "expected"),
  [
    ({"a": ONE}, {"a": ONE}),
    ({"model_state_dict": {"a": ONE}}, {"a": ONE}),
    ({"ema_model_state_dict": {0.9999: {"a": TWO}}}, {"a": TWO}),
    # An EMA of some tensors; the model's own complete it.
    (
      {
        "model_state_dict": {"a": ONE, "b": TWO},
        "ema_model_state_dict": {0.9999: {"a": 2 * ONE}},
      },
      {"a": 2 * ONE, "b": TWO},
    ),
  ],
)
def test_what_a_pt_holds(tmp_path, content, expected):
  save(tmp_path / "x.pt", content)
  checkpoints.assert_same(read(tmp_path / "x.pt"), expected)


@pytest.mark.parity
def test_several_averages_are_not_chosen_from(tmp_path):
  averages = {0.99: {"a": ONE}, 0.9999: {"a": ONE}}
  save(tmp_path / "x.pt", {"ema_model_state_dict": averages})
  with pytest.raises(errors.UserError, match="expected a single entry"):
    sources.open_source(tmp_path / "x.pt")


@pytest.mark.parity
def test_views_of_one_storage(tmp_path):
  """Slices and transpositions share what the file holds once."""
  import torch

  base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
  views = {"rows": base[1:4], "turned": base.T, "columns": base[:, 2:5]}
  torch.save(views, tmp_path / "x.pt")
  opened = sources.open_source(tmp_path / "x.pt")
  for name, view in views.items():
    np.testing.assert_array_equal(opened[name].read(), view.numpy())
  np.testing.assert_array_equal(
    opened["rows"].rows(1, 3), views["rows"][1:].numpy()
  )
  assert opened["turned"].rows is None
