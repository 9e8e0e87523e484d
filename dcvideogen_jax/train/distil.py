"""Distillation: fewer evaluations of the transformer for a video, as a task.

A frozen teacher, with guidance, teaches a student of the same architecture:

- "guidance": the student's velocity is the guided one, so that a step takes one
  evaluation instead of two (arXiv 2210.03142).
- "consistency": the student jumps from any noise level to the next of a few
  levels, or to none, along the teacher's trajectory. The derivative along the
  trajectory is exact, by forward-mode differentiation (arXiv 2410.11081; with
  several levels, arXiv 2405.18407).
- "matching": what the student makes in a few steps is distributed as what the
  teacher makes. A critic, a third transformer, follows the student and predicts
  the velocity of what it makes at the moment; the difference between critic and
  teacher is the student's gradient (DMD2, arXiv 2405.14867).

With low-rank updates, student, teacher and critic share the frozen parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import convert, errors, sharding, tree
from dcvideogen_jax.adapt import align as align_lib
from dcvideogen_jax.adapt import phases
from dcvideogen_jax.convert import lora as lora_lib
from dcvideogen_jax.diffusion import few, flow, training
from dcvideogen_jax.latents import denoiser
from dcvideogen_jax.train import denoise, weights
from dcvideogen_jax.train import task as task_lib

KINDS = ("guidance", "consistency", "matching")
_KEYS = {"kind", "guidance", "levels", "lora"}
# Attention that has no forward-mode derivative.
_NO_JVP = ("by_chunks", "cudnn", "pallas", "splash")
# Noise levels of matching stay this far from 0 and 1, as in DMD2.
_MARGIN = 0.02
# Added to the norm of an error that is divided by it.
_SMALL = 0.1


def distil(config: Mapping[str, Any]) -> task_lib.Task:
  """Builds the task in which a transformer learns from another one.

  The variables are "params", and "lora" in phases with low-rank updates; in
  phases without them "teacher", frozen copies of the parameters; with the kind
  "matching" "critic", which trains too; and "encoders" and "negative/text" as
  in `denoise.denoise`.

  Args:
    config: as for `denoise.denoise`, with "distil": "kind", one of `KINDS`;
      "guidance", the teacher's scale; "levels", the noise levels from 1 down at
      which the student is evaluated, without the final 0; and "lora", from
      which student and critic start, such as the export of the phase
      "guidance", or None. "levels" in `config` are those of the teacher's
      velocity.

  Raises:
    errors.UserError: for a config that does not fit.
  """
  phase = phases.find(config["phase"])
  weights.check_start(config["start"], config["phase"])
  return denoise.task_of(_Distilling(config, phase), phase)


def few_steps(config: Mapping[str, Any]) -> few.FewSteps | None:
  """Returns how the student of a config is sampled; None for "guidance".

  A student that jumps from level to level stays on the teacher's trajectory.
  One that always jumps to the end, or that was matched, gets fresh noise.
  """
  found = config["distil"]
  if found["kind"] == "guidance":
    return None
  levels = tuple(found["levels"])
  along = found["kind"] == "consistency" and len(levels) > 1
  return few.FewSteps(levels, "euler" if along else "renoise", "its student")


class _Distilling(denoise.Denoising):
  """The functions of the distillation task."""

  def __init__(self, config: Mapping[str, Any], phase: phases.Phase):
    super().__init__({**config, "text_dropout": 0.0}, phase)
    found = config["distil"]
    if set(found) != _KEYS:
      raise errors.UserError(
        f"distil needs exactly the keys {', '.join(sorted(_KEYS))}, found "
        f"{sorted(found)}"
      )
    self._kind = errors.choose(
      "distil.kind", found["kind"], dict(zip(KINDS, KINDS, strict=True))
    )
    self._scale, self._lora = float(found["guidance"]), found["lora"]
    self._levels = flow.explicit(found["levels"]).sigmas[:-1]
    self._drops = config["negative"]
    self._plain = self._module.clone(lora_rank=0, lora_alpha=0.0)
    if self._module.chunk is not None:
      raise errors.UserError(
        "distillation is of whole clips: expected no config.model.chunk, found "
        f"{self._module.chunk}"
      )
    if self._kind == "consistency":
      _require_forward_mode(self._module)
    if self._lora and not phase.lora:
      raise errors.UserError(
        "distil.lora is for phases with low-rank updates: expected phase "
        f"guidance or few, found {config['phase']}"
      )

  def init(self, rng: jax.Array) -> dict[str, Any]:
    found = super().init(rng)
    own = "lora" if "lora" in found else "params"
    copies = {"critic": {own: found[own]}} if self._kind == "matching" else {}
    if own == "params":
      dtype = self._module.param_dtype
      copies["teacher"] = jax.tree.map(lambda x: x.astype(dtype), found[own])
    return found | copies

  def start(self, where: Mapping[str, Any]) -> dict[str, Any]:
    found = super().start(where)
    own = "lora" if "lora" in found else "params"
    if self._lora:
      found["lora"] = self._adapter(found["lora"])
    if own == "params":
      dtype = self._module.param_dtype
      found["teacher"] = jax.tree.map(
        lambda x: jnp.array(x, dtype, copy=True), found[own]
      )
    if self._kind == "matching":
      found["critic"] = {own: jax.tree.map(jnp.copy, found[own])}
    return found

  def _adapter(self, fresh: Any) -> Any:
    """Reads low-rank updates into arrays placed like `fresh`."""
    read = convert.load_lora("wan_dit", self._lora, self._plain)
    rank, alpha = self._module.lora_rank, self._module.lora_alpha
    if read.rank != rank:
      raise errors.UserError(
        f"distil.lora: {self._lora} has rank {read.rank}, expected lora.rank, "
        f"{rank}"
      )
    expected = jax.eval_shape(lambda: fresh)
    leaves = tree.flatten(lora_lib.collection(read, expected))
    # The files' factors include the scale that the model multiplies by.
    leaves = {
      name: x * rank / alpha if name.endswith("/b") else x
      for name, x in leaves.items()
    }
    return jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding),
      jax.tree.unflatten(jax.tree.structure(fresh), leaves.values()),
      fresh,
    )

  def draw(
    self, batch: task_lib.LatentBatch, rng: jax.Array
  ) -> task_lib.LatentBatch:
    rng, more = jax.random.split(rng)
    drawn = super().draw(batch, rng)
    if self._kind != "matching":
      return drawn
    shape, keys = batch[self._space].shape, jax.random.split(more, 5)
    b, n = shape[0], len(self._levels)
    fresh = (b, n - 1, *shape[1:])
    return {
      **drawn,
      "exit": jax.random.randint(keys[0], (b,), 0, n),
      "fresh_noise": jax.random.normal(keys[1], fresh, jnp.float32),
      "score_noise": jax.random.normal(keys[2], shape, jnp.float32),
      "critic_noise": jax.random.normal(keys[3], shape, jnp.float32),
      "critic_sigma": training.levels(keys[4], b, self._config["levels"]).sigma,
    }

  def _given(
    self, drawn: task_lib.LatentBatch, text: jax.Array
  ) -> dict[str, jax.Array]:
    """Returns the conditions of a velocity, as `denoiser.velocity` does."""
    if not self._images:
      return {"text": text}
    c = drawn[self._condition]
    extra = align_lib.condition(c, c)[..., c.shape[-1] :]
    return {"text": text, "image": drawn["image"], "extra": extra}

  def _student(self, variables, x, sigma, drawn, module=None):
    """Returns the student's velocity, or the critic's, in float32."""
    own = {k: variables[k] for k in ("params", "lora") if k in variables}
    return denoiser.velocity(
      module or self._module,
      False,
      True,
      sharding.constrain(x, "batch"),
      sigma * flow.TRAIN_STEPS,
      own,
      jnp.float32(1),
      self._given(drawn, drawn["text"]),
      None,
    )

  def _critic(self, variables, x, sigma, drawn):
    return self._student({**variables, **variables["critic"]}, x, sigma, drawn)

  def _teacher(self, variables, x, sigma, drawn):
    """Returns the teacher's guided velocity, which is not differentiated."""
    text = drawn["text"]
    negative = self._dropped(variables, text)
    params = variables.get("teacher", variables["params"])
    return jax.lax.stop_gradient(
      denoiser.velocity(
        self._plain,
        self._scale != 1,
        True,
        sharding.constrain(x, "batch"),
        sigma * flow.TRAIN_STEPS,
        {"params": params},
        jnp.float32(self._scale),
        self._given(drawn, text),
        self._given(drawn, jnp.broadcast_to(negative, text.shape)),
      )
    )

  def loss_fn(
    self, variables: Mapping[str, Any], drawn: task_lib.LatentBatch
  ) -> tuple[jax.Array, task_lib.Metrics]:
    if self._kind == "matching":
      return self._match(variables, drawn)
    sigma = drawn["sigma"]
    x = flow.add_noise(drawn[self._space], drawn["noise"], sigma)
    target = self._teacher(variables, x, sigma, drawn)
    v = self._student(variables, x, sigma, drawn)
    if self._kind == "guidance":
      error = jnp.square(v - target).mean(range(1, v.ndim))
      return (drawn["weight"] * error).mean(), {"mse": error.mean()}
    levels = jnp.asarray([[*self._levels[1:], 0.0]])
    end = jnp.where(levels < sigma[:, None], levels, 0.0).max(axis=1)
    change = self._change(variables, x, sigma, target, drawn)
    target -= _per_sample(sigma - end, x) * change
    error = jnp.square(v - target).mean(range(1, v.ndim))
    norm = jnp.sqrt(jax.lax.stop_gradient(error)) + _SMALL
    return (error / norm).mean(), {"mse": error.mean()}

  def _change(self, variables, x, sigma, along, drawn):
    """Returns the velocity's derivative by the noise level, on a trajectory.

    It is computed in float32, as half precision rounds differences away.

    Args:
      variables, x, sigma, drawn: as for `_student`.
      along: derivative of x by the noise level: the teacher's velocity.
    """
    module = self._module.clone(dtype=jnp.float32)
    fixed = jax.lax.stop_gradient(variables)

    def velocity(x, sigma):
      return self._student(fixed, x, sigma, drawn, module)

    tangents = (along, jnp.ones_like(sigma))
    return jax.lax.stop_gradient(jax.jvp(velocity, (x, sigma), tangents)[1])

  def _match(self, variables, drawn):
    """Returns the losses of student and critic, whose gradients are apart."""
    fixed = jax.lax.stop_gradient(variables)
    x, sigma = self._arrive(fixed, drawn)
    x0 = x - _per_sample(sigma, x) * self._student(variables, x, sigma, drawn)
    made = jax.lax.stop_gradient(x0)
    at = jnp.clip(drawn["sigma"], _MARGIN, 1 - _MARGIN)
    noisy = flow.add_noise(made, drawn["score_noise"], at)
    real = self._teacher(fixed, noisy, at, drawn)
    fake = self._critic(fixed, noisy, at, drawn)
    level = _per_sample(at, x)
    axes = range(1, x.ndim)
    size = jnp.abs(made - (noisy - level * real)).mean(axes, keepdims=True)
    step = level * (real - fake) / size
    student = 0.5 * jnp.square(x0 - (made - step)).mean()

    at = jnp.clip(drawn["critic_sigma"], _MARGIN, 1 - _MARGIN)
    noisy = flow.add_noise(made, drawn["critic_noise"], at)
    v = self._critic({**fixed, "critic": variables["critic"]}, noisy, at, drawn)
    critic = training.squared_error(v, made, drawn["critic_noise"]).mean()
    return student + critic, {
      "critic": critic,
      "step": jnp.square(step).mean(),
      "std": jnp.std(made),
    }

  def _arrive(self, variables, drawn):
    """Samples to one of the levels, another for each sample of the batch.

    Returns:
      The noisy latents at that level, and the level (b,).
    """
    levels, leave = jnp.asarray(self._levels, jnp.float32), drawn["exit"]

    def step(carry, row):
      x, kept = carry
      number, sigma, following, fresh = row
      v = self._student(variables, x, jnp.full(len(x), sigma), drawn)
      x = flow.add_noise(x - sigma * v, fresh, following)
      kept = jnp.where(_per_sample(leave == number, x), x, kept)
      return (x, kept), None

    numbers = jnp.arange(1, len(levels))
    rows = (
      numbers,
      levels[:-1],
      levels[1:],
      drawn["fresh_noise"].swapaxes(0, 1),
    )
    noise = levels[0] * drawn["noise"]
    (_, x), _ = jax.lax.scan(step, (noise, noise), rows)
    return x, levels[leave]

  def measure(
    self, variables: Mapping[str, Any], drawn: task_lib.LatentBatch
  ) -> task_lib.Metrics:
    """Measures the squared distance of the student's velocity to the teacher's.

    It is a measure of success for the kind "guidance" alone.
    """

    def at(sigma):
      sigma = jnp.full(drawn["sigma"].shape, sigma)
      x = flow.add_noise(drawn[self._space], drawn["noise"], sigma)
      v = self._student(variables, x, sigma, drawn)
      error = jnp.square(v - self._teacher(variables, x, sigma, drawn))
      return error.mean(range(1, v.ndim))

    found = jax.lax.map(at, jnp.asarray(denoise.BUCKETS, jnp.float32))
    buckets = zip(denoise.BUCKETS, found, strict=True)
    return {
      "loss": found.mean(axis=0),
      **{f"loss_{sigma}": errors for sigma, errors in buckets},
    }


def _require_forward_mode(module: Any) -> None:
  """Refuses kernels that cannot be differentiated in forward mode.

  Raises:
    errors.UserError: names the kernel.
  """
  if module.attention in _NO_JVP:
    raise errors.UserError(
      f"attention {module.attention!r} has no forward-mode derivative, which "
      "distil.kind 'consistency' takes: expected config.model.attention "
      "'chunked' or 'reference'"
    )
  if module.weights in ("int8", "float8"):
    raise errors.UserError(
      f"kernels in {module.weights} have no forward-mode derivative, which "
      "distil.kind 'consistency' takes: expected config.weights unset"
    )


def _per_sample(values: jax.Array, x: jax.Array) -> jax.Array:
  """Appends axes to values (b,) until they multiply x (b, ...)."""
  return jnp.expand_dims(values, range(1, x.ndim))
