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

A block-causal student learns "guidance" as the causal training does, by noise
levels for each chunk and clean copies of the chunks before it (`forcing`). With
"matching" it makes its clips chunk by chunk, from its own KV cache (`rollout`).
Teacher and critic judge each chunk after the student's own chunks before it;
or, with a teacher of its own weights, the whole clip at once, as in
guandeh17/Self-Forcing `model/dmd.py` (commit 33593df).

`trio` has the three transformers.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax.adapt import phases
from dcvideogen_jax.diffusion import few, flow, training
from dcvideogen_jax.train import denoise, rollout, trio, weights
from dcvideogen_jax.train import task as task_lib

# Noise levels of matching stay this far from 0 and 1, as in DMD2.
_MARGIN = 0.02
# Added to the norm of an error that is divided by it.
_SMALL = 0.1


def distil(config: Mapping[str, Any]) -> task_lib.Task:
  """Builds the task in which a transformer learns from another one.

  The variables are "params", and "lora" in phases with low-rank updates; in
  phases without them, or with weights of its own, "teacher", frozen parameters;
  with the kind "matching" "critic", which trains too; and "encoders" and
  "negative/text" as in `denoise.denoise`.

  Args:
    config: as for `denoise.denoise`, with "distil": "kind", one of
      `trio.KINDS`; "guidance", the teacher's scale; "levels", the noise levels
      from 1 down at which the student is evaluated, without the final 0;
      "lora", from which student and critic start, such as the export of the
      phase "guidance", or None; and "teacher", weights of whole clips and of
      the same sizes, as which the critic starts too, or None (or nothing) for
      those of "start". "levels" in `config` are those of the teacher's
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
  solver = "euler" if along else "renoise"
  return few.FewSteps(
    levels, solver, "its student", config["model"].get("chunk")
  )


class _Distilling(trio.Trio):
  """The functions of the distillation task."""

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
      "critic_sigma": training.levels(
        keys[4], b, self._config["levels"], self._forcing.chunks(shape[1])
      ).sigma,
    }

  def loss_fn(
    self, variables: Mapping[str, Any], drawn: task_lib.LatentBatch
  ) -> tuple[jax.Array, task_lib.Metrics]:
    if self._kind == "matching":
      return self._match(variables, drawn)
    x0, sigma = drawn[self._space], drawn["sigma"]
    x, clean = self._noisy(x0, drawn["noise"], sigma), self._clean(x0, drawn)
    target = self._teacher(variables, x, sigma, drawn, clean)
    v = self._student(variables, x, sigma, drawn, clean)
    if self._kind == "guidance":
      weight = self._forcing.by_frame(drawn["weight"], x.shape[1])
      error = jnp.square(v - target).mean(range(weight.ndim, v.ndim))
      return (weight * error).mean(), {"mse": error.mean()}
    levels = jnp.asarray([[*self._levels[1:], 0.0]])
    end = jnp.where(levels < sigma[:, None], levels, 0.0).max(axis=1)
    change = self._change(variables, x, sigma, target, drawn)
    target -= self._level(sigma - end, x) * change
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
      return self._student(fixed, x, sigma, drawn, module=module)

    tangents = (along, jnp.ones_like(sigma))
    return jax.lax.stop_gradient(jax.jvp(velocity, (x, sigma), tangents)[1])

  def _match(self, variables, drawn):
    """Returns the losses of student and critic, whose gradients are apart."""
    fixed = jax.lax.stop_gradient(variables)
    x0 = self._made(variables, drawn)
    made = jax.lax.stop_gradient(x0)
    clean = None
    if self._judge.chunk is not None:
      clean = self._clean(made, drawn)
    at = jnp.clip(drawn["sigma"], _MARGIN, 1 - _MARGIN)
    noisy = self._noisy(made, drawn["score_noise"], at)
    real = self._teacher(fixed, noisy, at, drawn, clean)
    fake = self._critic(fixed, noisy, at, drawn, clean)
    level = self._level(at, noisy)
    axes = range(1, noisy.ndim)
    size = jnp.abs(made - (noisy - level * real)).mean(axes, keepdims=True)
    step = level * (real - fake) / size
    student = 0.5 * jnp.square(x0 - (made - step)).mean()

    at = jnp.clip(drawn["critic_sigma"], _MARGIN, 1 - _MARGIN)
    noisy = self._noisy(made, drawn["critic_noise"], at)
    learning = {**fixed, "critic": variables["critic"]}
    v = self._critic(learning, noisy, at, drawn, clean)
    critic = training.squared_error(v, made, drawn["critic_noise"]).mean()
    return student + critic, {
      "critic": critic,
      "step": jnp.square(step).mean(),
      "std": jnp.std(made),
    }

  def _made(self, variables, drawn):
    """Returns the clips that the student makes of a batch's noise."""

    def velocity(variables, x, sigma, frames, past):
      return self._student(variables, x, sigma, drawn, None, frames, past)

    size = self._forcing.chunk and self._forcing.chunk * self._forcing.patch
    return rollout.generate(
      velocity,
      functools.partial(self._cache, drawn),
      variables,
      self._levels,
      size,
      drawn,
    )

  def measure(
    self, variables: Mapping[str, Any], drawn: task_lib.LatentBatch
  ) -> task_lib.Metrics:
    """Measures the squared distance of the student's velocity to the teacher's.

    It is a measure of success for the kind "guidance" alone.
    """
    x0 = drawn[self._space]
    clean = self._clean(x0, drawn)
    judged = None if self._source else clean

    def at(sigma):
      sigma = jnp.full(drawn["sigma"].shape[:1], sigma)
      x = flow.add_noise(x0, drawn["noise"], sigma)
      v = self._student(variables, x, sigma, drawn, clean)
      error = v - self._teacher(variables, x, sigma, drawn, judged)
      return jnp.square(error).mean(range(1, v.ndim))

    found = jax.lax.map(at, jnp.asarray(denoise.BUCKETS, jnp.float32))
    buckets = zip(denoise.BUCKETS, found, strict=True)
    return {
      "loss": found.mean(axis=0),
      **{f"loss_{sigma}": errors for sigma, errors in buckets},
    }
