"""Distillation: the losses by hand, who learns from whom, and the starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors, tree
from dcvideogen_jax.diffusion import few
from dcvideogen_jax.train import distil, export
from tests.adapt import runs, tiny_models
from tests.train import finished

DISTIL = {
  "kind": "guidance",
  "guidance": 3.0,
  "levels": (1.0, 0.75, 0.5),
  "lora": None,
}


def config(phase="guidance", kind="t2v", start=None, distil=None, **changes):
  own = DISTIL | (distil or {})
  found = runs.config(phase, kind, task="distil", distil=own)
  return found | (runs.started(phase, **start) if start else {}) | changes


def begun(given, batch=4, kind="t2v", seed=0):
  """(task, variables without zeros, what is drawn for a batch)."""
  task = distil.distil(given)
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  variables = tiny_models.random(abstract, seed)
  draw = jax.jit(task.draw)
  return task, variables, draw(runs.batch(batch, kind), jax.random.key(seed))


def teacher(variables, name="deep_t2v"):
  """The guided velocity (x, sigma, drawn) of the parameters alone."""
  apply = jax.jit(tiny_models.module(name).apply)
  params = {"params": variables.get("teacher", variables["params"])}

  def velocity(x, sigma, drawn):
    time, rest = 1000 * sigma, []
    if "image" in drawn:
      mask = jnp.zeros((*x.shape[:-1], 4)).at[:, 0].set(1)
      x = jnp.concatenate([x, mask, drawn["deep_condition"]], axis=-1)
      rest = [drawn["image"]]
    v = apply(params, x, time, drawn["text"], *rest)
    without = apply(params, x, time, 0 * drawn["text"], *rest)
    return without + 3 * (v - without)

  return velocity


def student(variables, low_rank=True):
  changes = {"lora_rank": 3, "lora_alpha": 6.0} if low_rank else {}
  apply = jax.jit(tiny_models.module("deep_t2v", **changes).apply)
  own = {k: variables[k] for k in ("params", "lora") if k in variables}
  return lambda x, sigma, drawn: apply(own, x, 1000 * sigma, drawn["text"])


def noisy(x0, noise, sigma):
  sigma = sigma[:, None, None, None, None]
  return (1 - sigma) * x0 + sigma * noise


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_guidance_by_hand(kind):
  task, variables, drawn = begun(config(kind=kind), kind=kind)
  loss, metrics = jax.jit(task.loss_fn)(variables, drawn)
  x = noisy(drawn["deep"], drawn["noise"], drawn["sigma"])
  wanted = teacher(variables, f"deep_{kind}")(x, drawn["sigma"], drawn)
  # Without its update the student is the teacher without guidance.
  plain = dict(variables, lora=jax.tree.map(jnp.zeros_like, variables["lora"]))
  far, _ = jax.jit(task.loss_fn)(plain, drawn)
  assert abs(far - loss) > 1e-3
  if kind == "t2v":
    v = student(variables)(x, drawn["sigma"], drawn)
    error = jnp.square(v - wanted).mean((1, 2, 3, 4))
    np.testing.assert_allclose(metrics["mse"], error.mean(), rtol=1e-4)
    np.testing.assert_allclose(
      loss, (drawn["weight"] * error).mean(), rtol=1e-4
    )
  else:
    alone = distil.distil(config(kind=kind, distil={"guidance": 1.0}))
    same, _ = jax.jit(alone.loss_fn)(plain, drawn)
    assert same < 1e-8 < far


def test_the_negative_prompt_guides(tmp_path):
  text = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
  np.save(tmp_path / "negative.npy", text)
  given = config(negative=str(tmp_path / "negative.npy"))
  task, variables, drawn = begun(given)
  variables["negative"] = {"text": text}
  loss, _ = jax.jit(task.loss_fn)(variables, drawn)
  variables["negative"] = {"text": 0 * text}
  without, _ = jax.jit(task.loss_fn)(variables, drawn)
  plain, _ = jax.jit(begun(config())[0].loss_fn)(variables, drawn)
  np.testing.assert_allclose(without, plain, rtol=1e-6)
  assert abs(loss - plain) > 1e-3 * plain


@pytest.mark.parametrize("levels", [(1.0,), (1.0, 0.75, 0.5)])
def test_consistency_by_hand(levels):
  """The derivative along the trajectory is the limit of differences."""
  given = config("few", distil={"kind": "consistency", "levels": levels})
  task, variables, drawn = begun(given)
  _, metrics = jax.jit(task.loss_fn)(variables, drawn)
  sigma = drawn["sigma"]
  x = noisy(drawn["deep"], drawn["noise"], sigma)
  along = teacher(variables)(x, sigma, drawn)
  ours = student(variables)
  step = 1e-4
  later, earlier = (
    ours(x + h * along, sigma + h, drawn) for h in (step, -step)
  )
  change = (later - earlier) / (2 * step)
  end = [max(e for e in (*levels[1:], 0.0) if e < s) for s in sigma]
  span = (sigma - jnp.asarray(end))[:, None, None, None, None]
  error = jnp.square(ours(x, sigma, drawn) - (along - span * change))
  np.testing.assert_allclose(metrics["mse"], error.mean(), rtol=1e-2)
  wrong = jnp.square(ours(x, sigma, drawn) - along).mean()
  assert abs(wrong - error.mean()) > 0.05 * wrong


def matching(phase="few", **changes):
  return config(phase, distil={"kind": "matching"}, **changes)


@pytest.mark.parametrize("phase", ["few", "few_full"])
def test_matching_by_hand(phase):
  """Both losses and their gradients; each transformer has its own."""
  task, variables, drawn = begun(matching(phase))
  drawn["sigma"] = jnp.asarray([0.0, 0.3, 0.6, 1.0])
  own = "lora" if phase == "few" else "params"
  (_, metrics), grads = jax.jit(jax.value_and_grad(task.loss_fn, has_aux=True))(
    variables, drawn
  )
  low = phase == "few"
  ours = student(variables, low)
  critic = student({**variables, **variables["critic"]}, low)

  # Sampling with fresh noise to the level that each sample leaves at.
  levels = (1.0, 0.75, 0.5)
  x, arrived = drawn["noise"], []
  for i, sigma in enumerate(levels):
    arrived.append(x)
    x0 = x - sigma * ours(x, jnp.full(4, sigma), drawn)
    if i < 2:
      x = noisy(x0, drawn["fresh_noise"][:, i], jnp.full(4, levels[i + 1]))
  assert len(set(np.asarray(drawn["exit"]).tolist())) > 1
  x = jnp.stack([arrived[n][i] for i, n in enumerate(drawn["exit"])])
  sigma = jnp.asarray(levels)[drawn["exit"]]
  made = x - sigma[:, None, None, None, None] * ours(x, sigma, drawn)

  at = jnp.clip(drawn["sigma"], 0.02, 0.98)
  seen = noisy(made, drawn["score_noise"], at)
  level = at[:, None, None, None, None]
  real = seen - level * teacher(variables)(seen, at, drawn)
  fake = seen - level * critic(seen, at, drawn)
  size = jnp.abs(made - real).mean((1, 2, 3, 4), keepdims=True)
  step = (fake - real) / size
  np.testing.assert_allclose(
    metrics["step"], jnp.square(step).mean(), rtol=1e-3
  )
  at = jnp.clip(drawn["critic_sigma"], 0.02, 0.98)
  seen = noisy(made, drawn["critic_noise"], at)
  error = critic(seen, at, drawn) - (drawn["critic_noise"] - made)
  np.testing.assert_allclose(
    metrics["critic"], jnp.square(error).mean(), rtol=1e-3
  )

  def by_hand(leaves):
    v = student({**variables, own: leaves}, low)(x, sigma, drawn)
    x0 = x - sigma[:, None, None, None, None] * v
    return (step * x0).mean()

  wanted = tree.flatten(jax.jit(jax.grad(by_hand))(variables[own]))
  found = tree.flatten(grads[own])
  largest = max(float(jnp.abs(g).max()) for g in wanted.values())
  for name, value in wanted.items():
    np.testing.assert_allclose(
      found[name], value, rtol=0, atol=2e-3 * largest, err_msg=name
    )
  for name, value in tree.flatten(grads.get("teacher", {})).items():
    assert not np.asarray(value).any(), name
  assert any(np.asarray(g).any() for g in jax.tree.leaves(grads["critic"]))


def test_the_critic_learns_from_its_own_loss_only():
  task, variables, drawn = begun(matching())
  grad = jax.jit(jax.grad(lambda v, d: task.loss_fn(v, d)[0]))
  before = grad(variables, drawn)
  other = dict(drawn, score_noise=-drawn["score_noise"])
  after = grad(variables, other)
  jax.tree.map(np.testing.assert_array_equal, before["critic"], after["critic"])
  other = dict(drawn, critic_noise=-drawn["critic_noise"])
  after = grad(variables, other)
  jax.tree.map(np.testing.assert_array_equal, before["lora"], after["lora"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  path = tmp_path_factory.mktemp("weights") / "model"
  module = tiny_models.module("deep_t2v")
  variables = tiny_models.variables(module)
  convert.save(path, "wan_dit", module, variables, layout="diffusers")
  return path, variables["params"]


def start(given):
  task = distil.distil(given)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  return task.start(jax.tree.map(lambda _: where, abstract)), abstract


def described(variables):
  leaves = tree.flatten(variables)
  return {name: (x.shape, x.dtype) for name, x in leaves.items()}


def equal(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_all_start_as_the_teacher(weights):
  path, params = weights
  found, abstract = start(matching("few_full", start={"weights": path}))
  assert described(found) == described(abstract)
  for part in (found["params"], found["teacher"], found["critic"]["params"]):
    equal(part, params)


def test_student_and_critic_continue_an_adapter(weights, tmp_path):
  """The export of the phase guidance; PEFT's file holds the scale apart."""
  path, params = weights
  first = config(start={"weights": path}, lora={"rank": 3, "alpha": 7.5})
  averaged = finished.write(tmp_path / "run", first)
  export.export(tmp_path / "run", tmp_path / "lora", format="lora")
  given = matching(start={"weights": path})
  given["distil"]["lora"] = str(tmp_path / "lora")
  found, abstract = start(given)
  assert described(found) == described(abstract)
  equal(found["params"], params)
  equal(found["critic"]["lora"], found["lora"])
  for name, value in tree.flatten(averaged["lora"]).items():
    scale = 2.5 / 2 if name.endswith("/b") else 1
    ours = tree.flatten(found["lora"])[name]
    np.testing.assert_allclose(ours, scale * value, rtol=1e-6)
  given["lora"] = {"rank": 4, "alpha": 4.0}
  with pytest.raises(errors.UserError, match="has rank 3, expected"):
    start(given)


def test_exports_hold_no_critic(weights, tmp_path):
  path, _ = weights
  averaged = finished.write(tmp_path / "run", matching(start={"weights": path}))
  export.export(tmp_path / "run", tmp_path / "lora", format="lora")
  module = tiny_models.module("deep_t2v")
  read = convert.load_lora("wan_dit", tmp_path / "lora", module)
  ours = convert.from_collection(averaged["lora"], 6.0)
  assert set(read.factors) == set(ours.factors) and not read.whole
  for name, (a, b) in ours.factors.items():
    x, y = read.factors[name]
    np.testing.assert_allclose(x @ y, a @ b, rtol=1e-5, atol=1e-6)
  # The file says how its student is sampled.
  steps = few.read(tmp_path / "lora")
  assert (steps.levels, steps.solver) == (DISTIL["levels"], "renoise")


@pytest.mark.parametrize(
  ("changes", "solver"),
  [
    ({"kind": "consistency"}, "euler"),
    ({"kind": "consistency", "levels": (1.0,)}, "renoise"),
    ({"kind": "matching"}, "renoise"),
    ({"kind": "guidance"}, None),
  ],
)
def test_how_a_student_is_sampled(changes, solver):
  found = distil.few_steps(config("few", distil=changes))
  assert (found and found.solver) == solver


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "not readable"),
    ("[", "not readable"),
    ('{"levels": [1.0]}', "expected the keys"),
    ('{"levels": [0.5, 1.0], "solver": "euler"}', "must fall"),
    ('{"levels": [1.0], "solver": "ddim"}', "solvers are"),
    ('{"levels": [1.0], "solver": "euler", "chunk": 0}', "found 0"),
  ],
)
def test_damaged_few_json(text, message, tmp_path):
  if text is not None:
    (tmp_path / "few.json").write_text(text)
  with pytest.raises(errors.UserError, match=message):
    few.read(tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"distil": DISTIL | {"kind": "progressive"}}, "distil.kind must be one"),
    ({"distil": {"kind": "guidance"}}, "exactly the keys guidance, kind"),
    ({"distil": DISTIL | {"levels": (0.5, 1.0)}}, "noise levels must fall"),
    ({"model": {"chunk": 2}}, "of whole clips"),
    ({"model": {"attention": "cudnn"}}, "'cudnn' has no forward-mode"),
    ({"weights": "int8"}, "kernels in int8 have no forward-mode"),
  ],
)
def test_refused(changes, message):
  given = config("few")
  given["distil"] = given["distil"] | {"kind": "consistency"}
  for key, value in changes.items():
    both = isinstance(value, dict) and key == "model"
    given[key] = {**given[key], **value} if both else value
  with pytest.raises(errors.UserError, match=message):
    distil.distil(given)


def test_an_adapter_needs_low_rank_updates():
  with pytest.raises(errors.UserError, match="expected phase guidance or few"):
    distil.distil(config("few_full", distil={"lora": "some/adapter"}))
