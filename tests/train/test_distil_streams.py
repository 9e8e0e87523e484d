"""Distillation of block-causal models, against sequences without a KV cache."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors, sharding, tree
from dcvideogen_jax.diffusion import few
from dcvideogen_jax.models import layers
from dcvideogen_jax.train import distil
from tests.adapt import runs, tiny_models

# Latent frames of a clip, and of its chunks; the last one is shorter.
FRAMES, CHUNK = 3, 2
CHUNKS = (slice(0, 2), slice(2, 3))
# Noise level of the clean copies and of the KV cache.
CLEAN = 0.05
LEVELS = (1.0, 0.75, 0.5)
LORA = {"lora_rank": 3, "lora_alpha": 6.0}
# Tokens of a latent frame.
TOKENS = 4


def config(phase="few", task="t2v", forcing=None, start=None, **changes):
  """The config of a block-causal student; `changes` are those of "distil"."""
  own = {"kind": "matching", "guidance": 3.0, "levels": LEVELS, "lora": None}
  model = tiny_models.FIELDS[f"deep_{task}"] | {"chunk": CHUNK}
  found = runs.config(
    phase,
    task,
    task="distil",
    model=model,
    forcing=forcing or {"per_chunk": True, "clean": CLEAN},
    distil=own | changes,
  )
  return found | (runs.started(phase, **start) if start else {})


def begun(given, kind="t2v", seed=0):
  """(task, variables without zeros, what is drawn for a batch)."""
  task = distil.distil(given)
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  variables = tiny_models.random(abstract, seed)
  batch = runs.batch(4, kind, frames=FRAMES)
  drawn = jax.jit(task.draw)(batch, jax.random.key(seed))
  return task, variables, jax.device_get(drawn)


@functools.cache
def model(kind, chunk, low_rank):
  """The velocity (own, clips, timesteps by frame, drawn, text) of clips."""
  changes = LORA if low_rank else {}
  module = tiny_models.module(f"deep_{kind}", chunk=chunk, **changes)

  @jax.jit
  def apply(own, x, time, drawn, text):
    rest = []
    if kind == "i2v":
      mask = jnp.zeros((*x.shape[:-1], 4)).at[:, 0].set(1)
      x = jnp.concatenate([x, mask, drawn["deep_condition"]], axis=-1)
      rest = [drawn["image"]]
    return module.apply(own, x, time, text, *rest)

  return lambda own, x, time, drawn, text=None: np.asarray(
    apply(own, x, time, drawn, drawn["text"] if text is None else text)
  )


def guided(apply, own, x, time, drawn):
  v = apply(own, x, time, drawn)
  without = apply(own, x, time, drawn, 0 * drawn["text"])
  return without + 3 * (v - without)


def spread(values):
  """Levels by sample or by chunk, (b,) or (b, 2), for latents."""
  if values.ndim == 1:
    return values[:, None, None, None, None]
  return np.repeat(values, CHUNK, axis=1)[:, :FRAMES, None, None, None]


def level(value):
  return np.full(4, value, np.float32)


def noisy(x0, noise, sigma):
  return (1 - spread(sigma)) * x0 + spread(sigma) * noise


def after_clean(apply, own, clean, x, sigma, drawn, at=CLEAN):
  """Chunk by chunk: the clean frames before it, then the noisy chunk.

  The frames behind a chunk are noise, which the mask hides from it.
  """
  x0 = noisy(clean, drawn["clean_noise"], level(at)) if at else clean
  found = []
  for number, part in enumerate(CHUNKS):
    time = np.full((4, FRAMES), 1000 * at, np.float32)
    own_sigma = sigma if sigma.ndim == 1 else sigma[:, number]
    time[:, part] = 1000 * own_sigma[:, None]
    clip = drawn["noise"].copy()
    clip[:, : part.start], clip[:, part] = x0[:, : part.start], x[:, part]
    found.append(apply(own, clip, time, drawn)[:, part])
  return np.concatenate(found, axis=1)


def test_guidance_is_learned_after_clean_chunks():
  task, variables, drawn = begun(
    config("guidance", "i2v", kind="guidance"), "i2v"
  )
  loss, metrics = jax.jit(task.loss_fn)(variables, drawn)
  assert drawn["sigma"].shape == (4, 2)
  x = noisy(drawn["deep"], drawn["noise"], drawn["sigma"])
  own = {k: variables[k] for k in ("params", "lora")}
  v = after_clean(
    model("i2v", CHUNK, True), own, drawn["deep"], x, drawn["sigma"], drawn
  )
  plain, params = model("i2v", CHUNK, False), {"params": variables["params"]}
  wanted = after_clean(
    lambda *given: guided(plain, *given),
    params,
    drawn["deep"],
    x,
    drawn["sigma"],
    drawn,
  )
  error = np.square(v - wanted).mean((2, 3, 4))
  weight = spread(drawn["weight"])[..., 0, 0, 0]
  np.testing.assert_allclose(metrics["mse"], error.mean(), rtol=1e-4)
  np.testing.assert_allclose(loss, (weight * error).mean(), rtol=1e-4)
  assert abs(loss - error.mean()) > 1e-3 * loss


def made_by_hand(apply, own, drawn, at):
  """Sampled without a cache: (clips, noisy clips at the exits, exits)."""
  made, left = np.zeros_like(drawn["noise"]), []
  sigma = np.float32(LEVELS)[drawn["exit"]]
  for part in CHUNKS:

    def velocity(x, sigma, part=part):
      clip = drawn["noise"].copy()
      clip[:, part] = x
      return after_clean(apply, own, made, clip, sigma, drawn, at)[:, part]

    x, arrived = drawn["noise"][:, part], []
    for i, following in enumerate((*LEVELS[1:], None)):
      arrived.append(x)
      if following is not None:
        x0 = x - LEVELS[i] * velocity(x, level(LEVELS[i]))
        x = noisy(x0, drawn["fresh_noise"][:, i, part], level(following))
    x = np.stack([arrived[n][i] for i, n in enumerate(drawn["exit"])])
    left.append(x)
    made[:, part] = x - spread(sigma) * velocity(x, sigma)
  return made, np.concatenate(left, axis=1), sigma


def constant_past(start):
  """Stops gradients of what is before the latent frame `start`."""

  def stop(follow, args, kwargs, context):
    y = follow(*args, **kwargs)
    dense = isinstance(context.module, layers.Dense)
    if not dense or context.method_name != "__call__":
      return y
    per_frame = {FRAMES * TOKENS: TOKENS, FRAMES: 1}.get(y.shape[1], 0)
    past = (jnp.arange(y.shape[1]) < start * per_frame)[:, None]
    return jnp.where(past, jax.lax.stop_gradient(y), y)

  return nn.intercept_methods(stop)


def gradients_by_hand(variables, drawn, step, made, left, sigma):
  """Of the student's loss: the past is constant, and (second) it is not.

  The last evaluations alone are differentiated.
  """
  module = tiny_models.module("deep_t2v", chunk=CHUNK, **LORA)
  clean = noisy(made, drawn["clean_noise"], level(CLEAN))

  def loss(lora, clip, time, step, start):
    own = {"params": variables["params"], "lora": lora}
    with constant_past(start):
      v = module.apply(own, clip, time, drawn["text"])
    return (step * (left - spread(sigma) * v)).mean()

  gradient = jax.jit(jax.grad(loss))

  def of_chunk(part, constant):
    clip, time = clean.copy(), np.full((4, FRAMES), 1000 * CLEAN, np.float32)
    clip[:, part], time[:, part] = left[:, part], 1000 * sigma[:, None]
    own = np.zeros_like(step)
    own[:, part] = step[:, part]
    start = part.start if constant else 0
    return gradient(variables["lora"], clip, time, own, start)

  return [
    tree.flatten(jax.tree.map(np.add, *(of_chunk(x, constant) for x in CHUNKS)))
    for constant in (True, False)
  ]


def judgement(kind, variables, drawn, made):
  """(step, the critic's squared error) of clips; whole ones for i2v."""
  whole = "teacher" in variables
  params = variables["teacher" if whole else "params"]
  chunk = None if whole else CHUNK
  plain, rival = model(kind, chunk, False), model(kind, chunk, True)
  critic = {"params": params, **variables["critic"]}

  def judged(apply, own, x, at):
    if whole:
      return apply(own, x, 1000 * at, drawn)
    return after_clean(apply, own, made, x, at, drawn)

  def teacher(*given):
    return guided(plain, *given)

  at = np.clip(drawn["sigma"], 0.02, 0.98)
  seen = noisy(made, drawn["score_noise"], at)
  real = seen - spread(at) * judged(teacher, {"params": params}, seen, at)
  fake = seen - spread(at) * judged(rival, critic, seen, at)
  step = (fake - real) / np.abs(made - real).mean((1, 2, 3, 4), keepdims=True)
  at = np.clip(drawn["critic_sigma"], 0.02, 0.98)
  seen = noisy(made, drawn["critic_noise"], at)
  error = judged(rival, critic, seen, at) - (drawn["critic_noise"] - made)
  return step, np.square(error).mean()


def test_matching_after_clean_chunks():
  """What is made, how it is judged, and the gradients of student and critic."""
  task, variables, drawn = begun(config())
  assert drawn["sigma"].shape == drawn["critic_sigma"].shape == (4, 2)
  assert len(set(drawn["exit"].tolist())) > 1
  fixed, trained = dict(variables), {}
  for name in ("lora", "critic"):
    trained[name] = fixed.pop(name)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradients(trained, fixed):
    return task.loss_fn({**fixed, **trained}, drawn)

  grads, metrics = gradients(trained, fixed)
  own = {k: variables[k] for k in ("params", "lora")}
  made, left, sigma = made_by_hand(model("t2v", CHUNK, True), own, drawn, CLEAN)
  step, critic = judgement("t2v", variables, drawn, made)
  np.testing.assert_allclose(metrics["std"], made.std(), rtol=1e-4)
  np.testing.assert_allclose(metrics["step"], np.square(step).mean(), rtol=1e-3)
  np.testing.assert_allclose(metrics["critic"], critic, rtol=1e-3)
  assert any(np.any(g) for g in jax.tree.leaves(grads["critic"]))
  found = tree.flatten(grads["lora"])
  wanted, other = gradients_by_hand(variables, drawn, step, made, left, sigma)
  largest = max(float(np.abs(g).max()) for g in wanted.values())
  for name, value in wanted.items():
    np.testing.assert_allclose(
      found[name], value, rtol=0, atol=2e-3 * largest, err_msg=name
    )
  # A gradient through the KV cache would be another one.
  through = max(float(np.abs(other[n] - g).max()) for n, g in wanted.items())
  assert through > 0.02 * largest


@pytest.mark.slow
def test_matching_by_a_teacher_of_whole_clips():
  no_copies = {"per_chunk": True, "clean": None}
  given = config(task="i2v", forcing=no_copies, teacher="whole clips")
  task, variables, drawn = begun(given, "i2v")
  assert drawn["sigma"].shape == drawn["critic_sigma"].shape == (4,)
  _, metrics = jax.jit(task.loss_fn)(variables, drawn)
  own = {k: variables[k] for k in ("params", "lora")}
  made, _, _ = made_by_hand(model("i2v", CHUNK, True), own, drawn, 0.0)
  step, critic = judgement("i2v", variables, drawn, made)
  np.testing.assert_allclose(metrics["std"], made.std(), rtol=1e-4)
  np.testing.assert_allclose(metrics["step"], np.square(step).mean(), rtol=1e-3)
  np.testing.assert_allclose(metrics["critic"], critic, rtol=1e-3)


@pytest.mark.slow
def test_a_mesh_changes_nothing():
  task, variables, drawn = begun(config())
  loss = jax.jit(lambda v, d: task.loss_fn(v, d)[0])
  wanted = loss(variables, drawn)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  where = sharding.shardings(variables, mesh, [(".*", "fsdp")])
  with jax.set_mesh(mesh):
    found = loss(jax.device_put(variables, where), drawn)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """(path, parameters) of a block-causal model, and of one of whole clips."""
  found = []
  for seed, chunk in enumerate((CHUNK, None)):
    path = tmp_path_factory.mktemp("weights") / "model"
    module = tiny_models.module("deep_t2v", chunk=chunk)
    variables = tiny_models.variables(module, seed)
    convert.save(path, "wan_dit", module, variables, layout="diffusers")
    found.append((str(path), variables["params"]))
  return found


@pytest.mark.parametrize("phase", ["few", "few_full"])
def test_starts_with_a_teacher_of_whole_clips(phase, weights):
  (path, params), (teacher, wanted) = weights
  given = config(phase, start={"weights": path}, teacher=teacher)
  task = distil.distil(given)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  found = task.start(jax.tree.map(lambda _: where, abstract))
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (found, abstract))
  assert shapes[0] == shapes[1]
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, found["params"], params)
  jax.tree.map(equal, found["teacher"], wanted)
  if phase == "few_full":
    jax.tree.map(equal, found["critic"]["params"], wanted)
  else:
    # Updates that change nothing: the critic is this teacher.
    for name, x in tree.flatten(found["critic"]["lora"]).items():
      assert name.endswith("/a") == bool(np.any(x)), name


def test_the_export_says_the_chunk(tmp_path):
  steps = distil.few_steps(config())
  assert steps.chunk == CHUNK
  few.write(tmp_path, steps)
  assert few.read(tmp_path).chunk == CHUNK


@pytest.mark.parametrize(
  ("phase", "forcing", "changes", "message"),
  [
    ("few", None, {"kind": "consistency"}, "'consistency' is of whole clips"),
    ("guidance", None, {"kind": "guidance", "teacher": "x"}, "is no target"),
    ("few", {"per_chunk": True, "clean": None}, {}, "judges a chunk after"),
  ],
)
def test_refused(phase, forcing, changes, message):
  with pytest.raises(errors.UserError, match=message):
    distil.distil(config(phase, forcing=forcing, **changes))
