"""Batches for transformers, encoded beforehand or in the step."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors, sharding
from dcvideogen_jax.latents import conditions
from dcvideogen_jax.train import align, denoise, inputs
from tests import golden_data
from tests.adapt import runs

FIELDS = {
  "deep": ("dc_ae_v", golden_data.SMALL | {"chunk_frames": 4}),
  "base": (
    "wan_vae",
    {"base_width": 4, "multipliers": (1, 1, 1, 1), "blocks": 1},
  ),
  "text": (
    "umt5",
    {
      "vocab": 20,
      "layers": 1,
      "width": 12,
      "heads": 2,
      "head_width": 4,
      "ffn_width": 8,
      "buckets": 4,
      "max_distance": 8,
    },
  ),
  "image": (
    "clip_vision",
    {
      "image_size": 8,
      "patch": 4,
      "layers": 2,
      "width": 10,
      "heads": 2,
      "ffn_width": 8,
    },
  ),
}


def encoder(name):
  kind, fields = FIELDS[name]
  module = convert.KINDS[kind].build(fields)
  example = convert.KINDS[kind].example(module)
  abstract = jax.eval_shape(module.init, jax.random.key(0), *example)
  rng = np.random.default_rng(len(name))
  return module, jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), abstract
  )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """What a config says of the encoders."""
  folder = tmp_path_factory.mktemp("encoders")
  found = {}
  for name, (kind, _) in FIELDS.items():
    convert.save(folder / name, kind, *encoder(name))
    found[name] = {"path": str(folder / name), "dtype": "float32"}
  return found


def clips(count):
  rng = np.random.default_rng(0)
  return {
    "video": rng.integers(0, 256, (count, 8, 16, 16, 3), np.uint8),
    "ids": rng.integers(2, 20, (count, 5), np.int32),
    "mask": (np.arange(5) < rng.integers(1, 6, (count, 1))).astype(np.int32),
    "pixels": rng.normal(size=(count, 8, 8, 3)).astype(np.float32),
  }


def test_encoders_in_the_step_on_a_mesh(files):
  """Each clip as alone, whatever the devices; loaded where it says."""
  found = inputs.Encoders(files, ["deep", "text"])
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  abstract = jax.eval_shape(found.init, jax.random.key(0))
  where = sharding.shardings(abstract, mesh, ((".*", "fsdp"),))
  variables = found.load(where)
  assert sorted(variables["encoders"]) == ["deep", "text"]
  kernel = variables["encoders"]["text"]["blocks"]["attn"]["q"]["kernel"]
  assert not kernel.is_fully_replicated
  batch = clips(8)
  placed = jax.device_put(
    batch, jax.sharding.NamedSharding(mesh, sharding.BATCH)
  )
  with jax.set_mesh(mesh):
    encoded = jax.jit(found.encode)(variables, placed)
  assert sorted(encoded) == ["deep", "text"]
  modules, parameters = {}, {}
  for name in ("deep", "text"):
    modules[name], parameters[name] = encoder(name)

  @jax.jit
  def alone(clip):
    clip = {key: value[None] for key, value in clip.items()}
    return conditions.clips(modules, parameters, clip)

  for i in (0, 3, 7):
    expected = alone({key: value[i] for key, value in batch.items()})
    for name, value in expected.items():
      np.testing.assert_allclose(
        encoded[name][i], value[0], rtol=1e-4, atol=1e-5, err_msg=name
      )


@pytest.mark.parametrize(
  ("phase", "kind", "expected"),
  [
    ("embed", "t2v", ["base", "deep"]),
    ("embed", "i2v", ["base", "deep", "base_condition", "deep_condition"]),
    ("lora", "t2v", ["deep", "text"]),
    ("lora", "i2v", ["deep", "text", "deep_condition", "image"]),
    ("base", "t2v", ["base", "text"]),
  ],
)
def test_what_each_phase_encodes(files, phase, kind, expected):
  build = align.align if phase == "embed" else denoise.denoise
  task = build(runs.config(phase, kind, encoders=files))
  variables = jax.eval_shape(task.init, jax.random.key(0))
  found = jax.eval_shape(task.encode, variables, clips(2))
  assert sorted(found) == sorted(expected)
  shapes = {"base": (2, 2, 2, 2, 16), "deep": (2, 2, 2, 2, 4)}
  for name, value in found.items():
    assert value.dtype == jnp.float32
    if space := shapes.get(name.removesuffix("_condition")):
      assert value.shape == space, name
  assert not any(leaf.startswith("encoders/deep/y") for leaf in found)


def test_dropped_texts_of_raw_videos_need_the_negative_prompt(files):
  config = runs.config("scratch", encoders=files)
  with pytest.raises(errors.UserError, match="negative must name a .npy file"):
    denoise.denoise(config).start({})


def test_products_in_the_step_have_a_precision(files):
  """TPUs take float32 for bfloat16 where nothing is said."""
  found = inputs.Encoders(files, ["deep"])
  variables = jax.eval_shape(found.init, jax.random.key(0))
  with jax.default_matmul_precision(None):
    program = str(jax.make_jaxpr(found.encode)(variables, clips(1)))
  assert "precision=None" not in program and "Precision.HIGH" in program


def test_encoders_start_unlike_each_other(files, monkeypatch):
  used = []

  def init(module, key, *args):
    used.append(tuple(jax.random.key_data(key).tolist()))
    return {"params": {}}

  monkeypatch.setattr(nn.Module, "init", init)
  inputs.Encoders(files, ["base", "deep", "text"]).init(jax.random.key(0))
  assert len(set(used)) == 3


def test_encoded_clips_stay_as_they_are():
  task = denoise.denoise(runs.config("scratch"))
  batch = runs.batch()
  assert task.encode({}, batch) is batch


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"text": None}, "config.encoders needs 'text', found deep"),
    ({"deep": {"path": "/nowhere", "dtype": "float32"}}, "no file or direc"),
    ({"dtype": "float8"}, "dtype must be one of float32"),
  ],
)
def test_encoders_that_are_not_there(files, change, message):
  config = {name: dict(files[name]) for name in ("deep", "text")} | change
  if "dtype" in config:
    config["deep"]["dtype"] = config.pop("dtype")
  config = {name: value for name, value in config.items() if value}
  with pytest.raises(errors.UserError, match=message):
    inputs.Encoders(config, ["deep", "text"])


def take(count, **options):
  config = {"source": "noise", "shapes": {"deep": (2, 3), "text": (4,)}}
  data = inputs.batches(config, batch_size=3, **options)
  found = list(itertools.islice(data, count))
  return found, data


def test_random_batches_resume_and_differ_between_processes():
  found, data = take(2, seed=1)
  assert found[0]["deep"].shape == (3, 2, 3) and found[0]["text"].shape == (
    3,
    4,
  )
  position = data.get_state()
  expected = next(data)
  data.set_state(position)
  jax.tree.map(np.testing.assert_array_equal, next(data), expected)
  parts = [
    take(1, seed=1, shard_index=i, shard_count=2)[0][0]["deep"] for i in (0, 1)
  ]
  whole = np.concatenate([batch["deep"] for batch in found])
  np.testing.assert_array_equal(np.stack(parts, 1).reshape(whole.shape), whole)
  assert (take(1, seed=2)[0][0]["deep"] != found[0]["deep"]).all()


def test_unknown_source():
  with pytest.raises(errors.UserError, match="data.source must be one of lat"):
    inputs.batches({"source": "tape"}, batch_size=1, seed=0)
