"""What is converted once is read from the cache, bit for bit the same."""

import concurrent.futures
import json
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors, tree
from dcvideogen_jax.sample import loading, weights_cache
from tests.sample import published

MODELS = [
  ("wan_dit", "wan_flf2v", "original"),
  ("wan_dit", "dc_t2v", "diffusers"),
  ("dc_ae_v", None, None),
  ("wan_vae", None, "diffusers"),
  ("umt5", None, "transformers"),
  ("clip_vision", None, "transformers"),
]


class Counting:
  """`convert.load` that counts."""

  def __init__(self):
    self.calls = 0

  def __call__(self, *args):
    self.calls += 1
    return convert.load(*args)


@pytest.fixture
def counting():
  return Counting()


@pytest.fixture
def load(tmp_path, counting):
  return weights_cache.caching(tmp_path / "cache", 0, counting)


@pytest.fixture
def source(tmp_path):
  """A small transformer; its norms are wider than the rest."""
  directory = tmp_path / "source"
  published.save(directory, published.model("wan_dit", "dc_t2v"), "diffusers")
  return directory


def entries(tmp_path):
  return sorted(path.name for path in (tmp_path / "cache").glob("*"))


def empty(directory):
  """Makes files unreadable that still look the same."""
  for path in directory.iterdir():
    about = path.stat()
    path.write_bytes(b"\0" * about.st_size)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def assert_same(one, other):
  assert one[0] == other[0] and repr(one[0]) == repr(other[0])
  found, expected = tree.flatten(one[1]), tree.flatten(other[1])
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype, name
    np.testing.assert_array_equal(
      np.asarray(found[name]), np.asarray(x), err_msg=name
    )


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize(("kind", "name", "layout"), MODELS)
def test_same_as_converted(tmp_path, load, counting, kind, name, layout, dtype):
  directory = tmp_path / "source"
  published.save(directory, published.model(kind, name), layout)
  expected = convert.load(kind, directory, dtype=dtype)
  assert_same(load(kind, directory, dtype=dtype), expected)
  empty(directory)
  with pytest.raises(errors.UserError):
    convert.load(kind, directory, dtype=dtype)
  assert_same(load(kind, directory, dtype=dtype), expected)
  assert counting.calls == 1
  (entry,) = entries(tmp_path)
  dtype = "stored" if dtype is None else "bfloat16"
  assert entry.startswith(f"{kind}-{dtype}-")


def test_stored_dtypes_are_kept(tmp_path, load, counting):
  """Most tensors, but not most of our stacked parameters, are bfloat16."""
  made = published.model("wan_dit", "dc_t2v")
  tensors = convert.to_torch("wan_dit", made.module, made.variables)
  wide = {n for n in tensors if not n.startswith("blocks.")}
  wide |= {n for n in tensors if "attn" in n and n.endswith(".bias")}
  stored = {
    n: convert.api.sources.Tensor(
      x.shape,
      np.dtype(jnp.float32 if n in wide else jnp.bfloat16),
      lambda x=x, n=n: x if n in wide else x.astype(jnp.bfloat16),
    )
    for n, x in tensors.items()
  }
  (tmp_path / "source").mkdir()
  convert.write_safetensors(tmp_path / "source" / "model.safetensors", stored)
  config = published.DIT["dc_t2v"]
  expected = convert.load("wan_dit", tmp_path / "source", config)
  assert expected[0].param_dtype == jnp.bfloat16
  dtypes = {x.dtype.name for x in jax.tree.leaves(expected[1])}
  assert dtypes == {"bfloat16", "float32"}
  for _ in range(2):
    assert_same(load("wan_dit", tmp_path / "source", config), expected)
  assert counting.calls == 1


def test_a_changed_source_is_converted_anew(tmp_path, load, counting, source):
  load("wan_dit", source)
  before = entries(tmp_path)
  other = published.model("wan_dit", "dc_t2v")
  doubled = jax.tree.map(lambda x: 2 * x, other.variables)
  published.save(source, other._replace(variables=doubled), "diffusers")
  _, found = load("wan_dit", source)
  assert counting.calls == 2
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(doubled), strict=True
  ):
    np.testing.assert_array_equal(x, y)
  assert len(entries(tmp_path)) == 1 and entries(tmp_path) != before


def test_what_makes_another_entry(tmp_path, load, counting, source):
  load("wan_dit", source)
  load("wan_dit", source, dtype=jnp.float32)
  load("wan_dit", source, published.DIT["dc_t2v"])
  load("wan_dit", source, merge_lora=False)
  copy = shutil.copytree(source, tmp_path / "copy")
  load("wan_dit", copy)
  load("wan_dit", os.path.relpath(copy))
  assert counting.calls == 5 and len(entries(tmp_path)) == 5
  about = [
    json.loads(path.read_text())["source"]
    for path in (tmp_path / "cache").glob("*/source.json")
  ]
  assert sorted(about) == [str(copy)] + 4 * [str(source)]


def _flip(entry):
  path = entry / "model.safetensors"
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  "damage",
  [
    _flip,
    lambda entry: (entry / "model.safetensors").unlink(),
    lambda entry: (entry / "model.safetensors").write_bytes(b"\0" * 99),
    lambda entry: (entry / "config.json").unlink(),
    lambda entry: (entry / "config.json").write_text("{}"),
    lambda entry: (entry / "source.json").write_text("[]"),
    lambda entry: (entry / "source.json").unlink(),
  ],
)
def test_a_damaged_entry_is_made_anew(tmp_path, load, counting, source, damage):
  expected = load("wan_dit", source)
  (entry,) = (tmp_path / "cache").iterdir()
  damage(entry)
  assert_same(load("wan_dit", source), expected)
  assert_same(load("wan_dit", source), expected)
  assert counting.calls == 2


def test_small_sources_and_mappings_are_not_kept(tmp_path, counting, source):
  size = sum(path.stat().st_size for path in source.iterdir())
  load = weights_cache.caching(tmp_path / "cache", size + 1, counting)
  load("wan_dit", source)
  tensors = convert.to_torch(*published.model("wan_dit", "dc_t2v"))
  unlimited = weights_cache.caching(tmp_path / "cache", 0, counting)
  unlimited("wan_dit", tensors, published.DIT["dc_t2v"])
  assert not entries(tmp_path)
  weights_cache.caching(tmp_path / "cache", size, counting)("wan_dit", source)
  assert len(entries(tmp_path)) == 1 and counting.calls == 3


def test_other_models_in_the_directory_do_not_count(tmp_path, counting):
  directory = tmp_path / "source"
  published.save(directory, published.model("wan_dit", "wan_t2v"), "original")
  size = sum(path.stat().st_size for path in directory.iterdir())
  load = weights_cache.caching(tmp_path / "cache", size + 1, counting)
  (directory / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"\0" * 999)
  load("wan_dit", directory)
  assert not entries(tmp_path)


def test_processes_may_meet(tmp_path, load, counting, source):
  """Here threads, which all find nothing and then all write."""
  meeting = threading.Barrier(3)
  convert_one = counting.__call__

  def slowly(*args):
    meeting.wait()
    return convert_one(*args)

  meet = weights_cache.caching(tmp_path / "cache", 0, slowly)
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    found = list(pool.map(lambda _: meet("wan_dit", source), range(3)))
  found.append(load("wan_dit", source))
  assert counting.calls == 3
  for one in found:
    assert_same(one, convert.load("wan_dit", source))


def test_a_full_disk_costs_nothing(
  tmp_path, load, counting, source, monkeypatch
):
  size = sum(
    x.nbytes for x in jax.tree.leaves(convert.load("wan_dit", source)[1])
  )
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    shutil, "disk_usage", lambda _: usage._replace(free=2 * size - 1)
  )
  load("wan_dit", source)
  assert not entries(tmp_path)
  monkeypatch.setattr(
    shutil, "disk_usage", lambda _: usage._replace(free=2 * size)
  )
  load("wan_dit", source)
  assert len(entries(tmp_path)) == 1


def test_a_directory_that_cannot_be_made(tmp_path, load, counting, source):
  (tmp_path / "cache").write_text("a file")
  load("wan_dit", source)
  load("wan_dit", source)
  assert counting.calls == 2


def test_damaged_sources_are_told_as_ever(tmp_path, load, source):
  with pytest.raises(errors.UserError, match="there is no file or directory"):
    load("wan_dit", tmp_path / "gone")
  weights = source / "diffusion_pytorch_model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1])
  with pytest.raises(errors.UserError, match="not a whole safetensors file"):
    load("wan_dit", source)
  assert not entries(tmp_path)


def test_to_and_from_a_sharding(tmp_path, load, counting, source):
  mesh = jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  for sharding in (spread, None, spread):
    found = load("wan_dit", source, sharding=sharding)
    assert_same(found, convert.load("wan_dit", source))
    leaf = jax.tree.leaves(found[1])[0]
    assert len(leaf.sharding.device_set) == (1 if sharding is None else 2)
  assert counting.calls == 1


def test_a_pipeline_from_the_cache(tmp_path, counting):
  load = weights_cache.caching(tmp_path / "cache", 0, counting)
  first = loading.load(published.TINY, load_model=load)
  again = loading.load(published.TINY, load_model=load)
  assert counting.calls == 3
  for one, other in zip(
    jax.tree.leaves(first.transformer.variables),
    jax.tree.leaves(again.transformer.variables),
    strict=True,
  ):
    np.testing.assert_array_equal(one, other)
  assert again.transformer.module == first.transformer.module
