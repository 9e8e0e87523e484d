"""Autoencoders and encoders multiply float32 exactly, whoever runs them.

Tests set the precision of products for everything (`conftest`), which programs
do not. So what runs here is lowered as programs lower it, and what XLA is given
is read. On a TPU the default is one pass of bfloat16.
"""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax.latents import conditions, spaces
from dcvideogen_jax.models import (
  bands,
  calls,
  dc_ae_v,
  eight_bits,
  layers,
  streaming,
)
from dcvideogen_jax.precompute import encoders as encoders_lib
from dcvideogen_jax.sample import layouts, sizes
from dcvideogen_jax.train import rendering as training
from dcvideogen_jax.train import step
from tests.sample import published, small
from tests.train import test_rendering as rendering
from tests.train import test_tasks

VIDEO = np.random.default_rng(0).integers(0, 256, (1, 10, 8, 12, 3), np.uint8)


def precisions(text):
  """Of the products and convolutions in a program's StableHLO."""
  words = re.findall(r"precision(?: = \[)? ?(DEFAULT|HIGHEST|HIGH)", text)
  return set(words)


@pytest.fixture
def lowered(monkeypatch):
  """Name of a jitted function -> precisions in all that it was lowered to.

  The functions are not compiled, and give zeros.
  """
  found = collections.defaultdict(set)

  def record(owner, name):
    function = getattr(owner, name)

    def run(*args, **kwargs):
      traced = function.trace(*args, **kwargs)
      found[name] |= precisions(traced.lower().as_text())
      return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), traced.out_info
      )

    monkeypatch.setattr(owner, name, run)

  record(calls, "apply")
  for name in ("encode_text", "encode_images"):
    record(conditions, name)
  record(encoders_lib, "_text")
  record(spaces, "encode_at_once")
  with jax.default_matmul_precision(None):
    yield found


def test_sampling(lowered):
  made = small.make("i2v", texts=True)
  size = sizes.Size(8, 8, 12)
  made.embed("a cat")
  made.condition(small.PHOTO, None, size)
  latent = np.ones((1, 2, 2, 3, 4), np.float32)
  [*made.parts.space.decode(latent, size, jnp.float32, 1e9)]
  assert lowered["encode_text"] == {"HIGHEST"}
  assert lowered["encode_images"] == {"HIGHEST"}
  assert lowered["apply"] == {"HIGH"}


def test_streams(lowered):
  space, size = small.make().parts.space, sizes.Size(8, 8, 20)
  found = space.encode_stream([VIDEO[:, :, :, :8]], 8, 8, 1e9)
  [*space.decode_stream(found, (1, 2, 2), size, jnp.float32, 1e9)]
  assert lowered["apply"] == {"HIGH"}


def test_videos_of_a_training(lowered):
  space = rendering.autoencoder("dc")
  found = training.condition(space, np.zeros((8, 16, 3), np.uint8), 8)
  [*space.decode(found[None], (8, 8, 16), jnp.float32, 1e9)]
  assert lowered["apply"] == {"HIGH"}


def test_wans_autoencoder(lowered):
  """In sampling, and in videos of a training."""
  model, image = published.model("wan_vae")[1:], np.zeros((8, 8, 3), np.uint8)
  space, size = spaces.WanVAELatents(*model), sizes.Size(1, 8, 8)
  [*space.decode(space.condition(image, None, 1, 0), size, jnp.bfloat16, 0)]
  found = training.condition(space, image, 1)
  [*space.decode(found[None], size, jnp.float32, 0)]
  assert lowered["apply"] == {"HIGH"}


@pytest.mark.parametrize(
  "plan", [bands.BandPlan(), bands.BandPlan(cut=1, rows=2)]
)
def test_reconstruction(lowered, plan):
  """As `launch.reconstruct` has it, whole and in bands."""
  space = small.make().parts.space
  model = space.module, space.variables
  found = streaming.encode(*model, [VIDEO], plan=plan)
  for _ in streaming.decode(*model, found, plan=plan):
    pass
  assert lowered["apply"] == {"HIGH"}


def test_encoding_beforehand(lowered, tmp_path, monkeypatch):
  monkeypatch.setattr(
    encoders_lib.convert,
    "load",
    lambda kind, path, dtype: published.model(kind)[1:],
  )
  encoders = encoders_lib.Encoders(
    layouts.Paths(
      **dict.fromkeys(layouts.Paths._fields)
      | dict.fromkeys(("dc_ae_v", "wan_vae"), tmp_path)
    ),
    encoders_lib.Options(8, 1, False, False, 1e9, "high", "float32", 6),
  )
  encoders.clips(np.zeros((1, 8, 16, 32, 3), np.uint8), None)
  assert lowered["apply"] == {"HIGH"}
  assert lowered["encode_at_once"] == {"HIGH"}


def test_texts_encoded_beforehand_are_those_of_sampling(lowered):
  text = small.make(texts=True).parts.texts.encoder
  ids = np.ones((1, 9), np.int32)
  encoders_lib._text(text.module, text.variables, ids, ids)
  assert lowered["_text"] == {"HIGHEST"}


def test_training_of_an_autoencoder(lowered):
  """Its steps may be fast; what is measured is what others will see."""
  deep = {"task": "autoencoder", "model": small.AUTOENCODER}
  for config in (test_tasks.WAN, test_tasks.WAN | {"loss": {"l1": 1.0}} | deep):
    task = step.build_task(config)
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = {"video": np.zeros((1, 8, 8, 8, 3), np.uint8)}
    batch = task.draw(batch, jax.random.key(1))
    loss = jax.jit(jax.grad(task.loss_fn, has_aux=True)).lower(params, batch)
    measure = jax.jit(task.predict_fns["measure"]).lower(params, batch)
    for program, expected in ((loss, "DEFAULT"), (measure, "HIGH")):
      assert precisions(program.as_text()) == {expected}


@pytest.mark.parametrize(
  ("dtype", "asked", "expected"),
  [
    (jnp.float32, None, "HIGH"),
    (jnp.float32, "default", "DEFAULT"),
    (jnp.float32, "highest", "HIGHEST"),
    (jnp.bfloat16, None, "DEFAULT"),
  ],
)
def test_what_is_asked_for_comes_first(dtype, asked, expected):
  """Of the model as it stands, which `launch.evaluate` applies."""
  module = dc_ae_v.build(small.AUTOENCODER, dtype=dtype)
  variables = small.make().parts.space.variables
  with jax.default_matmul_precision(asked):
    text = (
      jax.jit(module.apply).lower(variables, VIDEO[:, :8] / 127.5).as_text()
    )
  assert precisions(text) == {expected}


@pytest.mark.parametrize("kernel", [jnp.bfloat16, jnp.float32, jnp.int8])
def test_bfloat16_is_multiplied_as_such_on_a_cpu(kernel):
  """XLA would convert the kernel to float32, whose products take longer."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(24, 40)), jnp.bfloat16)
  w = jnp.asarray(rng.integers(-9, 9, (40, 56)), kernel)

  def run(x, w):
    if kernel == jnp.int8:
      return eight_bits.linear(x, w, jnp.full(56, 0.5))
    return layers.linear(x, w)

  program = jax.jit(run).lower(x, w).compile()
  text = program.as_text()
  assert re.search(r"f32\[24,56\]\S* dot\(", text)
  if kernel == jnp.bfloat16:
    assert "f32[40,56]" not in text
  exact = np.asarray(x, np.float32) @ np.asarray(w, np.float32)
  exact *= 0.5 if kernel == jnp.int8 else 1
  found = np.asarray(program(x, w), np.float32)
  # Half a unit of the last of eight bits, and the rounding of the sums.
  assert np.abs(found - exact).max() <= 2**-8 * np.abs(exact).max()
  gradient = jax.jit(jax.grad(lambda x: run(x, w).astype(jnp.float32).sum()))
  rows = np.asarray(w, np.float32).sum(axis=1)
  rows *= 0.5 if kernel == jnp.int8 else 1
  found = np.asarray(gradient(x), np.float32)
  assert np.abs(found - rows).max() <= 2**-8 * np.abs(rows).max()
