"""No random key is used twice in a training."""

import jax
import numpy as np
import optax
import pytest

from dcvideogen_jax.train import align, denoise, step, validation, weights
from dcvideogen_jax.train import task as task_lib
from tests import keys
from tests.adapt import runs
from tests.adapt.test_adapt_configs import config


@pytest.mark.parametrize(
  "phase", ["embed", "head", "lora", "lora,causal=teacher", "base"]
)
def test_a_step_of_each_phase(phase):
  """With the start, as jax checks it."""
  found = config(f"tiny_t2v,phase={phase},runlocal")
  if "teacher" in phase:
    found["forcing"]["clean"] = 0.1
  with jax.debug_key_reuse(True):
    run = step.plan(found)
    batch = {
      name: jax.ShapeDtypeStruct((8, *shape), np.float32)
      for name, shape in found["data"]["shapes"].items()
    }
    step.trace(run, found, batch)
    jax.eval_shape(lambda: run.task.init(task_lib.start_key(0)))
  assert run.state.rng.dtype == np.uint32  # As checkpoints have it.


def test_a_reused_key_would_be_seen():
  def twice(key):
    return jax.random.normal(key) + jax.random.uniform(key)

  with (
    jax.debug_key_reuse(True),
    pytest.raises(jax.errors.KeyReuseError),
  ):
    jax.jit(twice).trace(jax.random.key(0))


def test_start_steps_and_validation_have_keys_of_their_own(monkeypatch):
  """Also of seed 0, which validation draws from in every run."""
  forcing = {"per_chunk": True, "clean": 0.1}
  model = runs.config("full")["model"] | {"chunk": 1}
  task = denoise.denoise(runs.config("full", model=model, forcing=forcing))
  state = step.new_state({}, optax.identity(), 0, False)
  watched = keys.Keys(monkeypatch)
  watched.use(task_lib.start_key(0), "what starts at random")
  for number in range(3):
    at = state.replace(step=np.int32(number))
    task.draw(runs.batch(1), step.step_key(at))
    validation._draw(task, {}, runs.batch(1), number)
  assert len(watched.uses) > 3 * 2 * 4 and not watched.reused()


@pytest.mark.parametrize("phase", ["embed", "scratch"])
def test_what_starts_at_random_has_the_key_for_it(monkeypatch, phase):
  class Asked(Exception):
    pass

  def drawing(init, names, where):
    def stop(key):
      raise Asked(jax.random.key_data(key).tolist())

    return stop

  monkeypatch.setattr(weights, "drawing", drawing)
  build = align.align if phase == "embed" else denoise.denoise
  task = build(runs.config(phase, seed=5))
  with pytest.raises(Asked) as found:
    task.start(jax.eval_shape(task.init, jax.random.key(0)))
  expected = jax.random.key_data(task_lib.start_key(5)).tolist()
  assert found.value.args == (expected,)
