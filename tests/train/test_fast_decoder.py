"""A smaller decoder learns from the model's own, for the same latents."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors, levels, tree
from dcvideogen_jax.models import dc_ae_v
from dcvideogen_jax.train import export, fast_decoder, step
from tests import random_weights
from tests.train import finished

MODEL = {
  "latent_channels": 4,
  "widths": (8, 8, 16, 16),
  "depths": (0, 2, 2, 1),
  "chunk_frames": 4,
  "spatial_factor": 4,
  "temporal_factor": 2,
}
SMALLER = {"widths": (8, 4, 16, 16), "depths": (0, 1, 1, 1)}
LOSS = {"l1": 1.0, "teacher": 0.5, "features": 0.25}
CONFIG = {
  **finished.COMMON,
  "task": "autoencoder",
  "phase": "fast",
  "start": "random",
  "weights": None,
  "model": MODEL,
  "decoder": SMALLER,
  "loss": LOSS,
  "data": {"source": "synthetic", "frames": 4, "height": 8, "width": 8},
}
SCALE = 0.75


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """A model's directory and parameters."""
  module = dc_ae_v.build(MODEL, latent_scale=SCALE)
  shapes = convert.KINDS["dc_ae_v"].init(module)
  variables = random_weights.like(shapes, norms=1.0)
  directory = tmp_path_factory.mktemp("teacher") / "model"
  convert.save(directory, "dc_ae_v", module, variables)
  return directory, variables["params"]


def _config(teacher, **changes):
  start = {"start": "weights", "weights": str(teacher[0])}
  return CONFIG | start | changes


def _video(frames, size=8):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (8, frames, size, size, 3), np.uint8)


def test_it_starts_from_the_teacher_where_shapes_allow(teacher, capsys):
  run = step.plan(_config(teacher))
  state, frozen = step.init(run)
  told = capsys.readouterr().out
  at = "decoder/stages_2/op_list_1"
  assert f"| {at} | {at}/conv1, {at}/conv2, {at}/conv2/norm |" in told
  assert "| decoder/stages_1/op_list_1 | new |" in told
  assert {*state.params} == {"decoder", "projections"}
  assert {*frozen} == {"encoder", "teacher"}
  own = tree.flatten(teacher[1])
  for part, name in (("encoder", "encoder"), ("teacher", "decoder")):
    for leaf, x in tree.flatten(frozen[part]).items():
      np.testing.assert_array_equal(x, own[f"{name}/{leaf}"])
  taken = 0
  for leaf, x in tree.flatten(state.params["decoder"]).items():
    # Widths differ in stage 1 alone, which the output follows.
    if not leaf.startswith(("stages_1/", "norm_out/", "project_out/")):
      np.testing.assert_array_equal(x, own[f"decoder/{leaf}"])
      taken += 1
    elif leaf.endswith(("conv2/norm/scale", "op_list_0/conv/kernel")):
      assert not np.any(x), leaf  # Silent beside its shortcut.
    else:
      assert leaf.endswith("bias") or np.any(x), leaf
  assert taken == 14
  shapes = tree.shapes(state.params["projections"])
  assert shapes == {"stages_1/kernel": (4, 8)}
  jax.tree.map(np.testing.assert_array_equal, frozen, step.init_frozen(run))


@functools.cache
def _step(frames):
  """Variables, and loss, metrics and gradients by all of them."""
  task = step.build_task(CONFIG)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  variables = random_weights.like(shapes, norms=1.0)
  batch = {"video": _video(frames)}
  drawn = task.draw(batch, jax.random.key(3))
  both = jax.jit(jax.value_and_grad(task.loss_fn, has_aux=True))
  return variables, drawn, *both(variables, drawn)


@pytest.mark.parametrize("frames", [4, 1])
def test_terms_are_those_of_both_decoders(frames):
  """Against whole decoders, and their stages one by one."""
  variables, drawn, (loss, metrics), _ = _step(frames)
  modules = dc_ae_v.build(MODEL), dc_ae_v.build(MODEL | SMALLER)
  video = levels.to_float(drawn["video"])
  if frames == 1:  # An image is two equal frames.
    modules = [m.unchunked() for m in modules]
    video = np.repeat(video, 2, axis=1)
  encode = random_weights.jitted(modules[0], "encode")
  latents = encode({"params": variables}, video)
  names = (fast_decoder.TEACHER, "decoder")
  halves = [{"params": {"decoder": variables[name]}} for name in names]

  def both(method, **options):
    return [
      np.asarray(random_weights.jitted(m, method, **options)(half, latents))
      for m, half in zip(modules, halves, strict=True)
    ]

  theirs, output = both("decode")
  l1, known = (np.abs(output - x).mean() for x in (video, theirs))
  distances = []
  for stage in (3, 2, 1):
    theirs, found = both("decode_coarse", cut=stage)
    if stage == 1:
      found = found @ variables["projections"]["stages_1"]["kernel"]
    axes = (1, 2, 3, 4)
    error = np.square(found - theirs).sum(axes) / np.square(theirs).sum(axes)
    distances.append(error.mean())
  np.testing.assert_allclose(metrics["l1"], l1, rtol=1e-4)
  np.testing.assert_allclose(metrics["teacher"], known, rtol=1e-4)
  np.testing.assert_allclose(metrics["features"], np.mean(distances), rtol=1e-4)
  expected = l1 + 0.5 * known + 0.25 * np.mean(distances)
  np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_teacher_is_a_constant():
  *_, gradients = _step(4)
  for name, x in tree.flatten(gradients).items():
    part = name.partition("/")[0]
    assert np.any(x) == (part != "teacher"), name


def test_only_the_decoder_moves(teacher):
  config = _config(teacher)
  run = step.plan(config)
  (state, frozen), advance = step.init(run), step.compile_step(run, config)
  before = jax.device_get((state.params, frozen))
  with jax.set_mesh(run.mesh):
    # The learning rate of the first step is zero, and the second step only
    # moves the scales by which new branches are silent.
    for _ in range(3):
      batch = step.put(run.mesh, {"video": _video(4)})
      state, metrics = advance(state, frozen, batch)
  assert np.isfinite(float(metrics["loss"]))
  jax.tree.map(np.testing.assert_array_equal, before[1], frozen)
  for name, x in tree.flatten(state.params).items():
    assert np.any(np.asarray(x) != tree.flatten(before[0])[name]), name


def test_a_run_gives_the_decoder_alone(teacher, tmp_path):
  ema = finished.write(tmp_path / "run", _config(teacher))
  export.export(tmp_path / "run", tmp_path / "out", "float32")
  module, found = convert.load("dc_ae_v_decoder", tmp_path / "out")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["kind"] == "dc_ae_v_decoder"
  assert module == dc_ae_v.build(MODEL | SMALLER, latent_scale=SCALE)
  expected = {"decoder": ema["decoder"]}
  jax.tree.map(np.testing.assert_array_equal, found["params"], expected)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"decoder": None}, "expected the widths and depths of one in config.deco"),
    ({"phase": "low"}, "every layer.*expected none in config.decoder, found"),
    (
      {"phase": "low", "decoder": None},
      "teacher and features of config.loss are for a smaller decoder",
    ),
    (
      {"decoder": SMALLER | {"widths": (8, 4, 16)}},
      "config.decoder: 3 widths and 4 depths",
    ),
    (
      {"decoder": SMALLER | {"widths": (8, 4, 12, 16)}},
      "config.decoder: widths .* do not fit",
    ),
    ({"decoder": SMALLER | {"time": "causal"}}, "decoder has the keys widths"),
    ({"start": "weights"}, "phase fast starts from weights: expected a model"),
  ],
)
def test_what_does_not_fit(changes, message):
  with pytest.raises(errors.UserError, match=message):
    step.plan(CONFIG | changes)


def test_depths_alone_need_no_projections():
  config = CONFIG | {"decoder": {"depths": (0, 1, 1, 1)}}
  run = step.plan(config)
  assert {*run.state.params} == {"decoder"}
  drawn = {"video": jax.ShapeDtypeStruct((8, 4, 8, 8, 3), jnp.uint8)}
  variables = tree.merge(run.state.params, run.frozen)
  _, metrics = jax.eval_shape(run.task.loss_fn, variables, drawn)
  assert {"teacher", "features"} <= metrics.keys()
