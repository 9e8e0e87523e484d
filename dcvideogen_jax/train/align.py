"""The first phase of AE-Adapt-V as a task; see `adapt.align`."""

from collections.abc import Mapping
from typing import Any

import jax

from dcvideogen_jax import errors, sharding, tree
from dcvideogen_jax.adapt import align as align_lib
from dcvideogen_jax.adapt import phases
from dcvideogen_jax.train import inputs, weights
from dcvideogen_jax.train import task as task_lib


def align(config: Mapping[str, Any]) -> task_lib.Task:
  """Builds the task in which a patch embedding learns the base model's tokens.

  The student embeds the new latents, the teacher those of the base model. The
  variables are "params/patch_embed" (student) and "teacher/patch_embed", each
  with "kernel" and "bias", and "encoders" for raw video.

  Args:
    config: "phase", which is "embed"; "model" and "base", the fields of
      `WanDiT` for the new latents and for the base model; "align" as for
      `adapt.align.loss`; "start" as for `weights.check_start`; "encoders" as
      for `inputs.Encoders`; "dtype", that of the computation; "frozen_dtype",
      which `weights.build` needs but which has no effect here; "seed".

  Raises:
    errors.UserError: for a config that does not fit.
  """
  phase = phases.find(config["phase"])
  weights.check_start(config["start"], config["phase"])
  run = _Alignment(config, phase)
  return task_lib.Task(
    run.init,
    run.loss_fn,
    {"measure": run.measure},
    encode=run.encoders.encode,
    trainable=phase.trainable,
    start=run.start,
    batches=inputs.batches,
  )


class _Alignment:
  """The functions of the alignment task."""

  def __init__(self, config: Mapping[str, Any], phase: phases.Phase):
    self._config = config
    self._dtype = weights.dtype(config, "dtype")
    self._student, self._teacher = (
      weights.build({**config, "model": config[key]}, phase)
      for key in ("model", "base")
    )
    if self._student.width != self._teacher.width:
      raise errors.UserError(
        "config.model and config.base differ in width: "
        f"{self._student.width} and {self._teacher.width}"
      )
    self._images = self._student.image_width is not None
    names = ["base", "deep"]
    names += [f"{name}_condition" for name in names] if self._images else []
    self.encoders = inputs.Encoders(config["encoders"], names)

  def init(self, rng: jax.Array) -> dict[str, Any]:
    student, teacher, encoders = jax.random.split(rng, 3)
    return {
      "params": {
        "patch_embed": weights.new_patch_embed(student, self._student)
      },
      "teacher": {
        "patch_embed": weights.new_patch_embed(teacher, self._teacher)
      },
      **self.encoders.init(encoders),
    }

  def start(self, where: Mapping[str, Any]) -> dict[str, Any]:
    rng = task_lib.start_key(self._config["seed"])
    expected = jax.eval_shape(self.init, rng)
    expected = {key: expected[key] for key in ("params", "teacher")}
    found = weights.drawing(self.init, tree.names(expected), where)(rng)
    if source := self._config["start"]["base"]:
      read = weights.read_patch_embed(source, self._teacher)
      found["teacher"] = {"patch_embed": read}
    return {
      **weights.place(found, expected, {key: where[key] for key in expected}),
      **self.encoders.load(where),
    }

  def _tokens(
    self, variables: Mapping[str, Any], batch: task_lib.LatentBatch
  ) -> tuple[align_lib.Tokens, align_lib.Teacher]:
    """Returns the tokens of the student and of the teacher."""

    def tokens(collection: str, space: task_lib.Space) -> align_lib.Tokens:
      latents = sharding.constrain(batch[space], "batch")
      if self._images:
        condition = batch[task_lib.CONDITIONS[space]]
        latents = align_lib.condition(latents, condition)
      patch_embed = variables[collection]["patch_embed"]
      return align_lib.tokens(patch_embed, latents, self._dtype)

    return tokens("params", "deep"), tokens("teacher", "base")

  def loss_fn(
    self, variables: Mapping[str, Any], drawn: task_lib.LatentBatch
  ) -> tuple[jax.Array, task_lib.Metrics]:
    student, teacher = self._tokens(variables, drawn)
    measured = align_lib.alignment_metrics(student, teacher)
    loss = align_lib.loss(student, teacher, self._config["align"])
    return loss, {"align_mse": measured["align_mse"].mean()}

  def measure(
    self, variables: Mapping[str, Any], drawn: task_lib.LatentBatch
  ) -> task_lib.Metrics:
    return align_lib.alignment_metrics(*self._tokens(variables, drawn))
