"""Starting points that are not random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from dcvideogen_jax import convert, errors, tree
from dcvideogen_jax.models import dc_ae_v, wan_vae
from dcvideogen_jax.tiny import world
from dcvideogen_jax.train import (
  autoencoder_phases,
  statistics,
  step,
  warm_starts,
)
from tests import random_weights

FIELDS = {"base_width": 16, "multipliers": (1, 1, 1, 1), "blocks": 1}


@pytest.fixture(scope="module")
def wan():
  module = wan_vae.build(FIELDS)
  example = jnp.zeros((1, 5, 8, 8, 3))
  return module, jax.jit(module.init)(jax.random.key(0), example)["params"]


@pytest.fixture(scope="module")
def clips():
  return np.stack([world.clip("train", i, 0, 5, 32, 32)[2] for i in range(4)])


def psnr(module, params, clips):
  video = jnp.asarray(clips, jnp.float32) / 127.5 - 1
  output = jax.jit(module.apply)({"params": params}, video)
  return float(10 * jnp.log10(4 / jnp.square(output - video).mean()))


def test_colours_pass_through_wan_s_autoencoder(wan, clips):
  module, params = wan
  start = warm_starts.through_colours(params)
  assert jax.tree.structure(start) == jax.tree.structure(params)
  assert tree.shapes(start) == tree.shapes(params)
  assert psnr(module, params, clips) < 12
  assert psnr(module, start, clips) > 17


def test_colours_need_room():
  module = wan_vae.build({**FIELDS, "base_width": 8})
  params = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 5, 8, 8, 3))
  )["params"]
  with pytest.raises(errors.UserError, match="needs 7 channels"):
    jax.eval_shape(warm_starts.through_colours, params)


def test_statistics_make_latents_standard(wan, clips):
  module, params = wan
  found = statistics.describe(module, params, [clips[:2], clips[2:]])
  module = module.clone(**found)
  video = jnp.asarray(clips, jnp.float32) / 127.5 - 1
  latents = module.normalise(
    module.apply({"params": params}, video, method="encode").mean
  )
  axes = (0, 1, 2, 3)
  np.testing.assert_allclose(latents.mean(axes), 0, atol=1e-2)
  np.testing.assert_allclose(latents.var(axes).mean(), 1, atol=1e-2)
  # Channels keep their strengths relative to each other.
  assert len(set(found["std"])) == 1
  assert latents.std(axes).max() > 1.1 * latents.std(axes).min()


def config(task):
  return tiny.get_config(f"{task},runlocal").to_dict()


@pytest.mark.parametrize(
  ("task", "kind"), [("autoencoder", "dc_ae_v"), ("wan_autoencoder", "wan_vae")]
)
def test_weights_to_start_from(tmp_path, task, kind):
  fields = config(task)["model"]
  made = step.build_task(config(task))
  params = jax.jit(made.init)(jax.random.key(1))
  module = convert.KINDS[kind].build(fields)
  convert.save(tmp_path, kind, module, {"params": params}, dtype=jnp.bfloat16)
  again = step.build_task(config(task) | {"weights": str(tmp_path)})
  where = jax.tree.map(
    lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), params
  )
  for name, leaf in tree.flatten(again.start(where)).items():
    expected = tree.flatten(params)[name].astype(jnp.bfloat16)
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, expected.astype(jnp.float32))


def test_the_scale_of_deep_latents(clips):
  fields = config("autoencoder")["model"]
  made = step.build_task(config("autoencoder"))
  params = jax.jit(made.init)(jax.random.key(1))
  module = convert.KINDS["dc_ae_v"].build(fields)
  video = np.concatenate([clips, clips[:, :3]], axis=1)  # Whole chunks.
  found = statistics.describe(module, params, [video])
  latents = module.apply(
    {"params": params}, jnp.asarray(video) / 127.5 - 1, method="encode"
  )
  scaled = latents * found["latent_scale"]
  np.testing.assert_allclose(jnp.square(scaled).mean(), 1, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("task", "names"),
  [("autoencoder", {"latent_scale"}), ("wan_autoencoder", {"mean", "std"})],
)
def test_what_an_export_measures(task, names):
  made, kind = step.build_task(config(task)), {"autoencoder": "dc_ae_v"}
  params = jax.jit(made.init)(jax.random.key(1))
  fields = config(task)["model"]
  module = convert.KINDS[kind.get(task, "wan_vae")].build(fields)
  found = statistics.measure(config(task), module, params)
  assert found.keys() == names
  assert found != statistics.measure(config(task) | {"seed": 5}, module, params)
  assert not statistics.measure(
    config(task) | {"statistics": 0}, module, params
  )


@pytest.mark.parametrize("phase", autoencoder_phases.PHASES)
def test_latents_of_a_frozen_encoder_keep_their_scale(phase, tmp_path):
  c = config("autoencoder") | {"phase": phase, "statistics": 0}
  module = dc_ae_v.build(c["model"], latent_scale=0.75)
  shapes = convert.KINDS["dc_ae_v"].init(module)
  convert.save(tmp_path / "a", "dc_ae_v", module, random_weights.like(shapes))
  rules = autoencoder_phases.trainable(
    autoencoder_phases.PHASES[phase], len(module.widths)
  )
  moves = any(
    jax.tree.leaves(tree.match_tree(rules, shapes["params"])["encoder"])
  )
  given = c | {"start": "weights", "weights": str(tmp_path / "a")}
  found = statistics.measure(given, module, None)
  assert found == ({} if moves else {"latent_scale": 0.75})
  assert moves == (phase in ("low", "high", "adversarial_all", "pixels"))
  assert not statistics.measure(c, module, None)
