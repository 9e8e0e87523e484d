"""What a transformer starts from in each phase, leaf by leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dcvideogen_jax import convert, errors, sharding, tree
from dcvideogen_jax.adapt import phases
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.train import denoise, weights
from tests.adapt import runs, tiny_models


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Name -> directory of a random transformer."""
  folder = tmp_path_factory.mktemp("transformers")

  @functools.cache
  def path(name, layout="diffusers"):
    module = tiny_models.module(name)
    variables = tiny_models.variables(module, seed=len(name))
    convert.save(folder / name, "wan_dit", module, variables, layout=layout)
    return folder / name

  return path


def anywhere(task):
  """A place for every variable."""
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  return jax.tree.map(lambda _: where, abstract)


def begin(config):
  """(task, name -> leaf of what it starts with)."""
  task = denoise.denoise(config)
  variables = task.start(anywhere(task))
  expected = jax.eval_shape(task.init, jax.random.key(0))
  found, leaves = tree.flatten(expected), tree.flatten(variables)
  assert {n: (x.shape, x.dtype) for n, x in leaves.items()} == {
    n: (x.shape, x.dtype) for n, x in found.items()
  }
  return task, leaves


def nested(task, leaves):
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())


def stored(path):
  _, variables = convert.load("wan_dit", path)
  return tree.flatten(variables)


SPACE = ("params/head/", "params/patch_embed/")


def test_frozen_kernels_are_rounded_as_they_are_read(files):
  path = files("deep_t2v")
  start = runs.started("lora", weights=path)
  _, leaves = begin(runs.config("lora", weights="int8", **start))
  _, variables = convert.load("wan_dit", path, weights="int8")
  expected = tree.flatten(variables)
  assert expected.keys() == {n for n in leaves if n.startswith("params/")}
  for name, value in expected.items():
    np.testing.assert_array_equal(leaves[name], value, err_msg=name)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_head_starts_from_base_and_first_phase(files, tmp_path, kind):
  base = files(f"base_{kind}")
  learned = tiny_models.variables(tiny_models.module(f"deep_{kind}"), seed=9)[
    "params"
  ]
  part = convert.to_torch(
    "wan_dit", tiny_models.module(f"deep_{kind}"), {"params": learned}
  )
  names = [name for name in part if name.startswith("patch_embedding")]
  file = tmp_path / "model.safetensors"
  convert.write_safetensors(
    file,
    convert.sources.open_source({f"0.{name}": part[name] for name in names}),
  )
  start = runs.started("head", base=base, patch_embed=file)
  task, leaves = begin(runs.config("head", kind, **start))
  before = stored(base)
  for name, value in leaves.items():
    if name.startswith("params/head/"):
      np.testing.assert_array_equal(value, 0, err_msg=name)
    elif name.startswith("params/patch_embed/"):
      expected = learned["patch_embed"][name.rsplit("/", 1)[1]]
      np.testing.assert_array_equal(value, expected, err_msg=name)
    else:
      np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_the_first_prediction_is_zero(files):
  """So nothing reaches the patch embedding in the first step."""
  changes = runs.started("head", base=files("base_t2v"))
  task, leaves = begin(runs.config("head", **changes))
  drawn = task.draw(runs.batch(), jax.random.key(0))
  gradient = jax.jit(jax.value_and_grad(task.loss_fn, has_aux=True))
  (loss, metrics), grads = gradient(nested(task, leaves), drawn)
  target = np.square(drawn["noise"] - drawn["deep"]).mean((1, 2, 3, 4))
  np.testing.assert_allclose(metrics["mse"], target.mean(), rtol=1e-5)
  np.testing.assert_allclose(loss, (drawn["weight"] * target).mean(), rtol=1e-5)
  for name in ("kernel", "bias"):
    np.testing.assert_array_equal(grads["params"]["patch_embed"][name], 0)
    assert np.abs(grads["params"]["head"][name]).max() > 0


def test_a_new_patch_embedding_is_random(files):
  """Without one from the first phase, which skips it; by the seed."""
  changes = runs.started("head", base=files("base_t2v"))
  (_, one), (_, other) = (
    begin(runs.config("head", **changes, seed=seed)) for seed in (0, 1)
  )
  for name, bound in (("kernel", (6 / 22) ** 0.5), ("bias", 6**-0.5)):
    value = one[f"params/patch_embed/{name}"]
    assert (value != other[f"params/patch_embed/{name}"]).all()
    assert 0.5 * bound < np.abs(value).max() <= bound


def test_direct_has_a_random_head(files):
  changes = runs.started("direct", base=files("base_t2v"), head="random")
  _, leaves = begin(runs.config("direct", **changes))
  assert np.abs(leaves["params/head/kernel"]).min() > 0
  np.testing.assert_array_equal(leaves["lora/blocks/ffn/linear_1/b"], 0)
  assert np.abs(leaves["lora/blocks/ffn/linear_1/a"]).max() > 0


def test_lora_begins_bit_equal_to_the_model_without(files):
  path = files("deep_i2v")
  changes = runs.started("lora", weights=path)
  task, leaves = begin(runs.config("lora", "i2v", **changes))
  for name, value in stored(path).items():
    np.testing.assert_array_equal(leaves[name], value, err_msg=name)
  assert any(name.startswith("lora/") for name in leaves)
  drawn = task.draw(runs.batch(kind="i2v"), jax.random.key(0))
  full = denoise.denoise(
    runs.config("full", "i2v", **runs.started("full", weights=path))
  )
  variables = nested(task, leaves)
  adapted = jax.jit(task.loss_fn)(variables, drawn)
  plain = jax.jit(full.loss_fn)({"params": variables["params"]}, drawn)
  jax.tree.map(np.testing.assert_array_equal, adapted, plain)


def test_merged_updates_predict_the_same(files):
  """Through the conversion that export uses."""
  changes = runs.started("lora", weights=files("deep_t2v"))
  config = runs.config("lora", **changes)
  task, leaves = begin(config)
  rng = np.random.default_rng(0)
  for name, value in leaves.items():
    if name.startswith("lora/"):
      leaves[name] = jnp.asarray(
        0.3 * rng.normal(size=value.shape), jnp.float32
      )
  variables = nested(task, leaves)
  update = convert.from_collection(variables["lora"], config["lora"]["alpha"])
  merged = convert.merge(variables["params"], update)
  moved = [
    name
    for name, value in tree.flatten(merged).items()
    if (value != leaves[f"params/{name}"]).any()
  ]
  assert len(moved) == 9
  drawn = task.draw(runs.batch(), jax.random.key(0))
  full = denoise.denoise(
    runs.config("full", **runs.started("full", weights="unread"))
  )
  apart, _ = jax.jit(task.loss_fn)(variables, drawn)
  together, _ = jax.jit(full.loss_fn)({"params": merged}, drawn)
  plain, _ = jax.jit(full.loss_fn)({"params": variables["params"]}, drawn)
  np.testing.assert_allclose(apart, together, rtol=1e-4)
  assert abs(plain - together) > 1e-3 * together


def test_image_to_video_from_text_to_video(files):
  changes = runs.started("full", weights=files("deep_t2v"))
  _, leaves = begin(runs.config("full", "i2v", **changes))
  before = stored(files("deep_t2v"))
  kernel = leaves["params/patch_embed/kernel"]
  np.testing.assert_array_equal(
    kernel[..., :6, :], before["params/patch_embed/kernel"]
  )
  np.testing.assert_array_equal(kernel[..., 6:, :], 0)
  np.testing.assert_array_equal(
    leaves["params/blocks/cross_attn/v_img/kernel"], 0
  )


@pytest.mark.parametrize(
  ("phase", "start", "name"),
  [
    ("head", "base", "base_t2v"),
    ("lora", "weights", "deep_t2v"),
    ("scratch", None, None),
  ],
)
def test_every_leaf_is_put_where_it_shall_be(files, phase, start, name):
  given = {start: files(name)} if start else {}
  task = denoise.denoise(runs.config(phase, **runs.started(phase, **given)))
  mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  where = sharding.shardings({"frozen": abstract}, mesh, common.DIT_SHARDING)
  found = task.start(where["frozen"])
  split = 0
  for name, leaf in tree.flatten(found).items():
    expected = tree.flatten(where["frozen"])[name]
    assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), name
    split += not leaf.sharding.is_fully_replicated
  assert split > 20
  if phase == "scratch":
    params = found.pop("params")
    assert not found
    np.testing.assert_array_equal(params["head"]["kernel"], 0)
    assert np.abs(params["text_embed"]["linear_1"]["kernel"]).max() > 0


def test_weights_of_another_model(files):
  fields = tiny_models.FIELDS["deep_t2v"] | {"heads": 1}
  changes = runs.started("head", base=files("base_t2v")) | {"model": fields}
  task = denoise.denoise(runs.config("head", **changes))
  with pytest.raises(errors.UserError, match="another model's.*heads 1, found"):
    task.start(anywhere(task))


def test_a_block_causal_model_is_not_one_of_whole_clips(files, tmp_path):
  fields = tiny_models.FIELDS["deep_t2v"] | {"chunk": 2}
  module = wan_dit.build(fields)
  variables = tiny_models.variables(module)
  convert.save(tmp_path, "wan_dit", module, variables, layout="diffusers")
  changes = runs.started("lora", weights=tmp_path)
  with pytest.raises(errors.UserError, match="in chunks of 2: expected"):
    begin(runs.config("lora", **changes))
  begin(runs.config("lora", model=fields | {"chunk": 1}, **changes))


def test_a_file_without_a_patch_embedding(files, tmp_path):
  convert.write_safetensors(
    tmp_path / "x.safetensors",
    convert.sources.open_source({"head.head.bias": np.ones(6, np.float32)}),
  )
  with pytest.raises(errors.UserError, match="no patch embedding; of its 1"):
    weights.read_patch_embed(
      tmp_path / "x.safetensors", tiny_models.module("deep_t2v")
    )


def test_only_what_is_asked_for_is_made():
  """A new patch embedding of a large transformer costs what it is."""
  module = wan_dit.build(
    tiny_models.FIELDS["deep_t2v"], layers=9, width=256, heads=4, ffn_width=1024
  )
  rules = phases.PHASES["head"].trainable
  init = weights.init(module, runs.started("head")["start"], rules)
  abstract = jax.eval_shape(init, jax.random.key(0))
  where = jax.tree.map(
    lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract
  )
  make = weights.drawing(init, ["params/patch_embed/kernel"], where)
  memory = make.lower(jax.random.key(0)).compile().memory_analysis()
  whole = sum(4 * x.size for x in jax.tree.leaves(abstract))
  assert memory.temp_size_in_bytes < whole / 20
  found = make(jax.random.key(0))
  assert tree.shapes(found) == {"params/patch_embed/kernel": (1, 1, 1, 6, 256)}
