"""The configs of the phases build, and the small ones take a step."""

import jax
import numpy as np
import pytest

from configs import adapt
from dcvideogen_jax import errors, tree
from dcvideogen_jax.adapt import phases
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.ops.attention import api
from dcvideogen_jax.train import loop, step


def config(arg):
  """Returns a config as dictionary, for eight fake devices and no files."""
  found = adapt.get_config(arg)
  found.batch_size = found.val.batch_size = 8
  found.start.random = True
  return found.to_dict()


@pytest.mark.parametrize(
  ("base", "name"),
  [
    ("wan_t2v_1_3b", "wan2.1-t2v-1.3b"),
    ("wan_t2v_14b", "wan2.1-t2v-14b"),
    ("wan_i2v_14b", "wan2.1-i2v-14b"),
  ],
)
def test_a_model_has_the_released_size(base, name):
  for phase, variant in (("base", name), ("head", f"dc-{name}")):
    fields = config(f"{base},phase={phase}")["model"]
    expected = wan_dit.build(wan_dit.VARIANTS[variant])
    assert wan_dit.build(fields, remat=expected.remat) == expected


@pytest.mark.parametrize("phase", phases.PHASES)
def test_every_phase_has_its_task(phase):
  found = config(f"wan_t2v_1_3b,phase={phase}")
  assert found["task"] == phases.PHASES[phase].task
  assert found.get("space") == {"embed": None, "base": "base"}.get(
    phase, "deep"
  )


@pytest.mark.parametrize(
  ("arg", "millions"),
  [
    ("wan_t2v_1_3b,phase=embed", 0.050688),
    ("wan_t2v_1_3b,phase=head", 0.102944),
    ("wan_t2v_14b,phase=full", 14_288),
    ("wan_i2v_14b,phase=lora", 821.1),
    ("tiny_t2v,phase=base", 3.951),
  ],
)
def test_builds(arg, millions):
  run = step.plan(config(arg))
  count = sum(leaf.size for leaf in jax.tree.leaves(run.state.params)) / 1e6
  assert count == pytest.approx(millions, rel=1e-3)


def test_the_official_sigma_grid():
  for base, shift in (("wan_t2v_14b", 8.0), ("wan_i2v_14b", 5.0)):
    found = config(f"{base},phase=lora,official_sigma_grid")["levels"]
    assert found == {"draw": "official", "shift": shift, "weighted": True}


def test_encoded_clips_bring_the_negative_prompt():
  found = adapt.get_config("wan_t2v_1_3b,phase=lora")
  found.data.path = "out/clips"
  assert found.negative == "out/clips"
  assert found.data["keys"] == ("deep", "text")
  keys = adapt.get_config("wan_i2v_14b,phase=embed").data["keys"]
  assert keys == ("base", "deep", "base_condition", "deep_condition")


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    (None, {"reference"}),
    ("chunked", {"chunked"}),
    # Dense attention by chunks calls what is chosen for a small matrix.
    ("by_chunks", {"by_chunks", "reference"}),
  ],
)
def test_attention_has_a_name(monkeypatch, name, expected):
  called = set()
  for key, function in api.IMPLEMENTATIONS.items():

    def noted(*args, key=key, function=function):
      called.add(key)
      return function(*args)

    monkeypatch.setitem(api.IMPLEMENTATIONS, key, noted)
  found = config("tiny_t2v,phase=lora,runlocal")
  found["model"]["attention"] = name
  run = step.plan(found)
  data = loop.batches(run, found["data"], 8, found["seed"])
  batch = step.put(run.mesh, next(data))
  data.close()
  called.clear()
  jax.eval_shape(
    lambda rng, batch: run.task.loss_fn(
      run.task.init(rng), run.task.draw(batch, rng)
    ),
    jax.random.key(0),
    batch,
  )
  assert called == expected


def test_an_unknown_attention():
  found = config("tiny_t2v,phase=lora,runlocal")
  found["model"]["attention"] = "fast"
  with pytest.raises(errors.UserError, match="attention must be one of .*fast"):
    step.plan(found)


def test_raw_videos_need_encoders():
  found = config("wan_i2v_14b,phase=lora,raw")
  assert sorted(found["encoders"]) == ["deep", "image", "text"]
  assert found["data"]["source"] == "captioned_videos"
  assert (found["data"]["frames"], found["data"]["image_size"]) == (80, 224)
  found = config("tiny_t2v,phase=embed,raw")
  assert sorted(found["encoders"]) == ["base", "deep"]
  assert (found["data"]["height"], found["data"]["image_size"]) == (64, None)


@pytest.mark.parametrize(
  "arg",
  [
    "tiny_i2v,phase=embed",
    pytest.param("wan_i2v_14b,phase=lora", marks=pytest.mark.slow),
    "tiny_t2v,phase=lora,causal=teacher",
    pytest.param("tiny_t2v,phase=few,causal=teacher", marks=pytest.mark.slow),
  ],
)
def test_runlocal_takes_a_step(arg):
  found = config(f"{arg},runlocal")
  # Behind a head that is zero and frozen nothing would learn.
  found["start"]["head"] = "random" if "phase=few" in arg else "zero"
  run = step.plan(found)
  state, frozen = step.init(run)
  advance = step.compile_step(run, found)
  before = {n: np.asarray(x) for n, x in tree.flatten(state.params).items()}
  data = loop.batches(run, found["data"], 8, found["seed"])
  with jax.set_mesh(run.mesh):
    for _ in range(2):
      batch = step.put(run.mesh, next(data))
      state, metrics = advance(state, frozen, batch)
  data.close()
  assert all(np.isfinite(float(x)) for x in metrics.values())
  after = tree.flatten(state.params)
  still = {name for name, x in before.items() if (after[name] == x).all()}
  # `a` has no gradient while `b` is zero, as `b` has none behind a zero head.
  first = {name for name in before if name.endswith("/a")}
  assert still == (set() if "phase=few" in arg else first)
