"""The flow-matching task: what it draws, loses and measures."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors, tree
from dcvideogen_jax.models import eight_bits
from dcvideogen_jax.train import denoise
from tests.adapt import runs, tiny_models


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_draws_of_the_whole_batch(share):
  task = denoise.denoise(runs.config(text_dropout=share))
  batch = runs.batch(600)
  drawn = jax.jit(task.draw)(batch, jax.random.key(1))
  assert drawn["noise"].shape == batch["deep"].shape
  assert {drawn[k].shape for k in ("sigma", "timestep", "weight", "drop")} == {
    (600,)
  }
  assert abs(np.asarray(drawn["drop"]).mean() - share) < 0.06
  noise = np.asarray(drawn["noise"])
  np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)
  # One draw says nothing of another.
  found = np.corrcoef([noise[:, 0, 0, 0, 0], drawn["sigma"]])
  assert abs(found[0, 1]) < 0.15
  if 0 < share < 1:
    found = np.corrcoef([drawn["drop"], drawn["sigma"]])
    assert abs(found[0, 1]) < 0.15
  again = jax.jit(task.draw)(batch, jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, drawn, again)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_loss_by_hand(kind, tmp_path):
  """Noise, mask, condition; dropped texts are the negative prompt's."""
  rng = np.random.default_rng(0)
  negative = rng.normal(size=(3, 12)).astype(np.float32)
  np.save(tmp_path / "negative.npy", negative)
  config = runs.config(
    "full",
    kind,
    text_dropout=0.5,
    negative=str(tmp_path / "negative.npy"),
  )
  task = denoise.denoise(config)
  variables = tiny_models.variables(tiny_models.module(f"deep_{kind}"))
  variables["negative"] = {"text": negative}
  drawn = dict(task.draw(runs.batch(kind=kind), jax.random.key(3)))
  drawn["drop"] = jnp.asarray([True, False, True, False])
  loss, metrics = jax.jit(task.loss_fn)(variables, drawn)

  x0, noise = (np.asarray(drawn[name]) for name in ("deep", "noise"))
  sigma = np.asarray(drawn["sigma"])[:, None, None, None, None]
  inputs = [(1 - sigma) * x0 + sigma * noise]
  rest = []
  if kind == "i2v":
    mask = np.zeros((*x0.shape[:-1], 4), np.float32)
    mask[:, 0] = 1
    inputs += [mask, drawn["deep_condition"]]
    rest = [drawn["image"]]
  text = np.array(drawn["text"])
  text[[0, 2]] = 0
  text[[0, 2], :3] = negative
  v = jax.jit(tiny_models.module(f"deep_{kind}").apply)(
    variables, np.concatenate(inputs, -1), 1000 * drawn["sigma"], text, *rest
  )
  error = np.square(v - (noise - x0)).mean((1, 2, 3, 4))
  np.testing.assert_allclose(metrics["mse"], error.mean(), rtol=1e-5)
  np.testing.assert_allclose(loss, (drawn["weight"] * error).mean(), rtol=1e-5)


def test_measures_of_every_noise_level():
  """With the text, whatever level was drawn, and equal to the loss there."""
  config = runs.config("full", text_dropout=1.0)
  task = denoise.denoise(config)
  variables = tiny_models.variables(tiny_models.module("deep_t2v"))
  measure = jax.jit(task.predict_fns["measure"])
  drawn = task.draw(runs.batch(), jax.random.key(0))
  found = measure(variables, drawn)
  other = dict(drawn, sigma=drawn["sigma"] / 2, timestep=drawn["timestep"] / 2)
  jax.tree.map(np.testing.assert_array_equal, found, measure(variables, other))
  levels = ["loss_0.1", "loss_0.3", "loss_0.5", "loss_0.7", "loss_0.9"]
  assert sorted(found) == sorted(["loss", *levels])
  assert {x.shape for x in found.values()} == {(4,)}
  np.testing.assert_allclose(
    found["loss"], np.mean([found[name] for name in levels], axis=0), rtol=1e-6
  )
  at = dict(
    drawn,
    sigma=jnp.full(4, 0.3),
    timestep=jnp.full(4, 300.0),
    drop=jnp.zeros(4, bool),
  )
  _, metrics = jax.jit(task.loss_fn)(variables, at)
  np.testing.assert_allclose(
    found["loss_0.3"].mean(), metrics["mse"], rtol=1e-6
  )


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_low_rank_updates_train_on_frozen_kernels_in_eight_bits(weights):
  """The loss and its gradients are those of the kernels as rounded."""
  # Behind a head of zeros all gradients are zero.
  start = {"start": runs.config()["start"] | {"head": "random"}}
  task = denoise.denoise(runs.config("lora", weights=weights, **start))
  plain = denoise.denoise(runs.config("lora", **start))
  variables = jax.jit(task.init)(jax.random.key(0))
  # Gradients of `a` are zero as long as `b` is.
  variables["lora"] = jax.tree.map(
    lambda x: x + 0.01 * np.arange(x.size).reshape(x.shape) / x.size,
    variables["lora"],
  )
  multiplied = tree.flatten(variables)
  stored = [n for n, x in multiplied.items() if eight_bits.is_stored(x.dtype)]
  assert stored and all("/blocks/" in name for name in stored)
  for name in stored:
    scale = multiplied.pop(name.removesuffix("kernel") + "scale")
    multiplied[name] = multiplied[name].astype(jnp.float32) * scale[:, None]
  multiplied = flax.traverse_util.unflatten_dict(multiplied, sep="/")
  drawn = task.draw(runs.batch(), jax.random.key(0))
  results = []
  for made, given in ((task, variables), (plain, multiplied)):

    def loss(lora, made=made, given=given):
      return made.loss_fn({**given, "lora": lora}, drawn)[0]

    results.append(jax.jit(jax.value_and_grad(loss))(given["lora"]))
  (found, gradients), (expected, others) = results
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  for x, y in zip(*map(jax.tree.leaves, (gradients, others)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)
  assert max(np.abs(x).max() for x in jax.tree.leaves(gradients)) > 1e-5


def test_kernels_in_eight_bits_do_not_train():
  task = denoise.denoise(runs.config("full", weights="int8"))
  with pytest.raises(errors.UserError, match="is in int8 and would train"):
    jax.eval_shape(task.init, jax.random.key(0))


def test_half_precision_keeps_masters_and_losses():
  config = runs.config(
    "lora", dtype="bfloat16", frozen_dtype="bfloat16", levels=OFFICIAL
  )
  task = denoise.denoise(config)
  variables = jax.jit(task.init)(jax.random.key(0))
  trains = tree.match(task.trainable, tree.names(variables))
  for name, leaf in tree.flatten(variables).items():
    kept = any(part in name for part in ("norm", "modulation", "time_embed"))
    expected = jnp.float32 if trains[name] or kept else jnp.bfloat16
    assert leaf.dtype == expected, name
  rng = np.random.default_rng(0)
  variables["params"]["head"] = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype),
    variables["params"]["head"],
  )
  drawn = task.draw(runs.batch(), jax.random.key(0))
  loss, metrics = jax.jit(task.loss_fn)(variables, drawn)
  assert loss.dtype == metrics["mse"].dtype == jnp.float32
  exact = denoise.denoise(config | {"dtype": "float32"})
  expected, _ = jax.jit(exact.loss_fn)(variables, drawn)
  assert loss != expected
  np.testing.assert_allclose(loss, expected, rtol=0.02)


OFFICIAL = {"draw": "official", "shift": 8.0, "weighted": True}


@pytest.mark.parametrize(
  ("phase", "changes", "message"),
  [
    ("tail", {}, "phase must be one of embed, head, lora"),
    ("head", runs.started("head"), "starts from one of base .*, found none"),
    (
      "head",
      runs.started("head", weights="x"),
      "phase head starts from one of base .*, found weights",
    ),
    (
      "full",
      runs.started("full", weights="x", base="y"),
      "found base, weights",
    ),
    (
      "lora",
      runs.started("lora", weights="x", patch_embed="y"),
      "patch_embed belongs to phase head",
    ),
    ("scratch", {"start": {"base": None}}, "start needs the keys"),
    ("scratch", {"space": "middle"}, "space must be one of deep, base"),
    ("scratch", {"text_dropout": 1.5}, "text_dropout must be within 0..1"),
    ("scratch", {"dtype": "float16"}, "dtype must be one of float32"),
    ("lora", {"weights": "int4"}, "weights must be None or one of int8"),
    ("scratch", {"model": {"layers": 2}}, "config.model: .*missing"),
    (
      "lora",
      {"lora": {"rank": 0, "alpha": 1.0}},
      "lora.rank must be positive, found 0",
    ),
  ],
)
def test_configs_that_make_no_sense(phase, changes, message):
  config = runs.config("scratch") | {"phase": phase} | changes
  with pytest.raises(errors.UserError, match=message):
    denoise.denoise(config)


def test_a_negative_prompt_of_more_tokens(tmp_path):
  np.save(tmp_path / "n.npy", np.ones((6, 12), np.float32))
  with pytest.raises(errors.UserError, match="^a text has 6 tokens, expected"):
    denoise.negative(str(tmp_path / "n.npy"), 5, 12)


def test_a_negative_prompt_of_another_width(tmp_path):
  np.save(tmp_path / "n.npy", np.ones((3, 7), np.float32))
  path = str(tmp_path / "n.npy")
  task = denoise.denoise(runs.config("scratch", negative=path))
  with pytest.raises(errors.UserError, match="has width 7, the texts 12"):
    jax.eval_shape(task.init, jax.random.key(0))


@pytest.mark.parametrize(
  ("array", "message"),
  [
    (np.ones((1, 3, 12), np.float32), r"an embedding \(s, e\), found \(1, 3"),
    (np.full((3, 12), np.nan, np.float32), "numbers that are not finite"),
  ],
)
def test_a_negative_prompt_that_is_none(tmp_path, array, message):
  np.save(tmp_path / "n.npy", array)
  with pytest.raises(errors.UserError, match=message):
    denoise.negative(str(tmp_path / "n.npy"), 3, 12)


def test_the_negative_prompt_is_no_part_of_the_program(tmp_path):
  """What is closed over becomes a literal, of 8 MB at the released size."""
  np.save(tmp_path / "n.npy", np.full((4, 12), 0.1234567, np.float32))
  path = str(tmp_path / "n.npy")
  task = denoise.denoise(runs.config("scratch", negative=path))
  variables = jax.eval_shape(task.init, jax.random.key(0))
  drawn = task.draw(runs.batch(), jax.random.key(0))
  text = jax.jit(task.loss_fn).lower(variables, drawn).as_text()
  assert "0.123456" not in text and 'dense<"0x' not in text
