"""Every config builds, and each `runlocal` takes an optimiser step."""

import math
import types

import jax
import ml_collections
import numpy as np
import pytest

from configs import common, dc_ae_v, sample, tiny
from dcvideogen_jax import errors, tree
from dcvideogen_jax.models import dc_ae_v as model
from dcvideogen_jax.train import loop, step

CASES = [
  *[(tiny, f"autoencoder,time={time}") for time in common.TIMES],
  *[(dc_ae_v, f"variant={name}") for name in model.VARIANTS],
  *[(dc_ae_v, f"phase={name}") for name in common.PHASES[1:]],
]
OF_DECODERS = (
  "decoder/project_in/kernel",
  "decoder/conv_in/kernel",
  "decoder/project_out/conv/kernel",
)
LOCAL = [
  (tiny, "autoencoder,runlocal"),
  *(
    pytest.param(
      tiny, f"autoencoder,time={time},runlocal", marks=pytest.mark.slow
    )
    for time in ("causal", "non_causal")
  ),
  (tiny, "wan_autoencoder,runlocal"),
  (tiny, "autoencoder,phase=adversarial,runlocal"),
  (tiny, "autoencoder,phase=fast,runlocal"),
  pytest.param(dc_ae_v, "phase=pixels,runlocal", marks=pytest.mark.slow),
  (dc_ae_v, "f32t4c32,runlocal"),
  pytest.param(dc_ae_v, "phase=high,runlocal", marks=pytest.mark.slow),
  pytest.param(
    dc_ae_v, "phase=adversarial_all,runlocal", marks=pytest.mark.slow
  ),
  pytest.param(
    dc_ae_v, "phase=adversarial_decoder,runlocal", marks=pytest.mark.slow
  ),
  pytest.param(dc_ae_v, "phase=fast,runlocal", marks=pytest.mark.slow),
]


def _id(value):
  return (
    value.__name__ if isinstance(value, types.ModuleType) else value
  ).replace("configs.", "")


def _on_eight_devices(config):
  """Batches that the eight fake devices of the tests can share."""
  config.batch_size = config.val.batch_size = 8
  return config.to_dict()


@pytest.mark.parametrize(("module", "arg"), CASES, ids=_id)
def test_builds(module, arg):
  config = module.get_config(arg)
  if config.start == "weights":
    config.start = "random"
  run = step.plan(_on_eight_devices(config))
  params = tree.shapes(run.state.params)
  assert tree.shapes(run.state.ema) == params
  size = sum(math.prod(shape) for shape in params.values())
  if module is tiny:
    assert 2 * size < 6e6, "more than 6 MB in bfloat16"


@pytest.mark.parametrize("name", model.VARIANTS)
def test_a_variant_is_trained_at_its_size(name):
  config = dc_ae_v.get_config(f"variant={name}").model.to_dict()
  expected = model.build(model.VARIANTS[name], latent_scale=1.0)
  assert model.build(config, remat=False) == expected


@pytest.mark.parametrize(("module", "arg"), LOCAL, ids=_id)
def test_runlocal_takes_a_step(module, arg):
  config = _on_eight_devices(module.get_config(arg))
  run = step.plan(config)
  (state, frozen), advance = step.init(run), step.compile_step(run, config)
  name = next(n for n in tree.names(state.params) if n in OF_DECODERS)
  before = np.asarray(tree.flatten(state.ema)[name])
  data = loop.batches(run, config["data"], config["batch_size"], config["seed"])
  with jax.set_mesh(run.mesh):
    # The learning rate of the first step is zero where there is a warm-up.
    for _ in range(2):
      batch = step.put(run.mesh, next(data))
      state, metrics = advance(state, frozen, batch)
  data.close()
  assert np.isfinite(float(metrics["loss"]))
  after = np.asarray(tree.flatten(state.params)[name])
  assert np.isfinite(after).all() and (after != before).any()


@pytest.mark.parametrize("model", sample.MODELS)
def test_sampling_defaults(model):
  config = sample.get_config(f"{model},size=720p")
  size = (720, 1280) if config.task == "t2v" else (None, None)
  assert (config.height, config.width) == size
  assert config.area == 720 * 1280
  assert config.frames % 4 == (1 if model.startswith("wan") else 0)
  assert config.steps >= 20 and config.guidance_scale > 1
  assert config.shift is None
  assert sample.get_config(model).area <= 720 * 1280


CHOICES = {"task": ("autoencoder", "t2v"), "n": (1, 2), "runlocal": ()}


@pytest.mark.parametrize(
  ("arg", "expected"),
  [
    (None, ("autoencoder", 1, False)),
    ("", ("autoencoder", 1, False)),
    ("t2v", ("t2v", 1, False)),
    ("t2v,runlocal", ("t2v", 1, True)),
    ("runlocal,n=2", ("autoencoder", 2, True)),
    ("task=t2v, n=2 ,runlocal=False", ("t2v", 2, False)),
  ],
)
def test_arguments(arg, expected):
  found = common.parse_arg(arg, CHOICES)
  assert isinstance(found, ml_collections.ConfigDict)
  assert (found.task, found.n, found.runlocal) == expected


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("i2v", "task must be one of autoencoder, t2v, found 'i2v'"),
    ("n=3", "n must be one of 1, 2, found '3'"),
    ("n", "n must be one of"),
    ("t2v,fast", "the keys task, n, runlocal, found 'fast'"),
    ("runlocal=maybe", "runlocal must be one of"),
  ],
)
def test_arguments_that_mean_nothing(arg, message):
  with pytest.raises(errors.UserError, match=message):
    common.parse_arg(arg, CHOICES)
