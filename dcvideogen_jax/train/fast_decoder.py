"""Distils a smaller decoder of the same latents from a model's own decoder.

The model's decoder is the teacher. The smaller one, the student, is the decoder
of another `dc_ae_v.DCAEV`, whose encoder does not exist: fewer channels and
blocks in the fine stages, where most of the work is. The encoder is frozen, so
that the student decodes the same latents.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dcvideogen_jax import convert, errors, sharding, tree
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import dc_ae_v, dc_ae_v_layers
from dcvideogen_jax.train import inflation, losses

# Terms of the loss that compare with the teacher.
TERMS = ("teacher", "features")
# Names of the variables beside "encoder" and "decoder".
TEACHER, PROJECTIONS = "teacher", "projections"

Features = Mapping[str, Float[Array, "b ..."]]


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of the model that decodes.

  Args:
    config: of a run: "model", and "decoder", the fields of a smaller decoder
      that differ; None or missing for the model's own.
  """
  return {**config["model"], **(config.get("decoder") or {})}


def latent_scale(config: Mapping[str, Any]) -> float | None:
  """Returns the scale of the latents that a run's smaller decoder decodes.

  Args:
    config: of the run, whose "weights" are the teacher's; without them there is
      no scale, and the result is None.

  Raises:
    errors.UserError: if the weights cannot be read.
  """
  if not config["weights"]:
    return None
  nothing = {"only": lambda name: False}
  module, _ = convert.load("dc_ae_v", config["weights"], **nothing)
  return module.latent_scale


class Distillation:
  """The student, and the terms of the loss that compare it with its teacher.

  Its variables are "decoder", the student's; "teacher", frozen; and
  "projections", of the student's features to the teacher's widths, which are
  not part of the result.
  """

  def __init__(
    self,
    teacher: dc_ae_v.DCAEV,
    student: dc_ae_v.DCAEV | None,
    weights: Mapping[str, float],
  ):
    """Builds the terms.

    Args:
      teacher: the model.
      student: the model that decodes; None for a run without one.
      weights: of `TERMS`.

    Raises:
      errors.UserError: if there is a weight but no student.
    """
    self.student = student or teacher
    self._teacher, self._weights, self._there = teacher, weights, bool(student)
    if any(weights.values()) and not student:
      raise errors.UserError(
        f"the terms {' and '.join(TERMS)} of config.loss are for a smaller "
        "decoder, config.decoder, found none"
      )

  def __bool__(self) -> bool:
    """Whether a smaller decoder trains."""
    return self._there

  def init(self, rng: jax.Array, teacher: Any) -> dict[str, Any]:
    """Returns the student and the projections.

    The student has the teacher's weights where name and shape are the same.
    Other branches are silent, so that what is known passes by them, along the
    shortcuts.

    Args:
      rng: key.
      teacher: the parameters of its decoder.
    """
    first, second = jax.random.split(rng)
    latents = jnp.zeros((1, 1, 1, 1, self.student.latent_channels))
    found = self.student.init(first, latents, method="decode")
    params = found["params"]["decoder"]
    known = tree.flatten({"decoder": teacher})
    leaves = tree.flatten({"decoder": params})
    for row in rows(known, leaves):
      leaf = leaves[row.name]
      new = inflation.as_new(row.name, leaf)
      leaves[row.name] = known[row.origin] if row.origin else new
    student = jax.tree.unflatten(jax.tree.structure(params), leaves.values())
    kernels = {}
    for stage in range(1, len(self.student.widths)):
      c, d = (m.widths[stage] for m in (self.student, self._teacher))
      if c != d:
        kernel = jax.random.normal(jax.random.fold_in(second, stage), (c, d))
        kernels[f"stages_{stage}"] = {"kernel": kernel / np.sqrt(c)}
    projections = {PROJECTIONS: kernels} if kernels else {}
    return {"decoder": student, **projections}

  def loss(
    self,
    variables: Mapping[str, Any],
    latents: Float[Array, "b tz hz wz z"],
    still: bool,
    output: losses.Video,
    features: Features,
  ) -> tuple[losses.Scalar, dict[str, losses.Scalar]]:
    """Returns the weighted sum of the terms that have a weight, and each term.

    "teacher" is the mean absolute difference of the outputs. "features" is the
    squared difference of the features after each stage, projected where widths
    differ, relative to the teacher's squared features: the mean over clips and
    stages of a ratio of two means over a clip. Features of zeros have 1.

    Args:
      variables: of the task.
      latents: that both decode.
      still: whether they are of images.
      output, features: the student's, of `decode`.
    """
    theirs, known = jax.lax.stop_gradient(
      decode(self._teacher, variables[TEACHER], latents, still)
    )
    terms = {}
    if self._weights["teacher"]:
      terms["teacher"] = losses.l1(output, theirs)
    if self._weights["features"]:
      projections = variables.get(PROJECTIONS, {})
      each = [
        _distance(_projected(projections, name, x), known[name])
        for name, x in features.items()
      ]
      terms["features"] = jnp.stack(each).mean()
    total = sum((self._weights[n] * x for n, x in terms.items()), jnp.zeros(()))
    return total, terms


def rows(
  teacher: Mapping[str, Any], student: Mapping[str, Any]
) -> list[inflation.Row]:
  """Returns which parameters of a student are the teacher's at the start.

  Args:
    teacher, student: parameters, or their shapes and dtypes, by name.

  Returns:
    A row for each parameter of the student. A layer is taken as a whole.
  """
  others = {
    name.rpartition("/")[0]
    for name, leaf in student.items()
    if name not in teacher or teacher[name].shape != leaf.shape
  }
  return [
    inflation.Row(name, None if name.rpartition("/")[0] in others else name)
    for name in student
  ]


def decode(
  module: dc_ae_v.DCAEV,
  params: Any,
  latents: Float[Array, "b tz hz wz z"],
  still: bool,
) -> tuple[losses.Video, Features]:
  """Decodes latents; returns the video and the features after each stage.

  Args:
    module: whose decoder it is.
    params: the decoder's.
    latents: unscaled.
    still: whether they are of images.
  """
  module = module.unchunked() if still else module
  video, found = module.apply(
    {"params": {"decoder": params}},
    latents,
    method="decode",
    capture_intermediates=lambda m, _: isinstance(m, dc_ae_v_layers.Stage),
    mutable=["intermediates"],
  )
  features = {
    name: calls["__call__"][0][0].astype(jnp.float32)
    for name, calls in found["intermediates"]["decoder"].items()
    if "__call__" in calls
  }
  return video.astype(jnp.float32), features


def _projected(
  projections: Any, name: str, x: Float[Array, "b t h w c"]
) -> Float[Array, "b t h w d"]:
  if name not in projections:
    return x
  # The columns of features are sharded, and XLA adds up wrongly if the input
  # channels of a kernel are sharded too.
  return x @ sharding.constrain(projections[name]["kernel"])


def _distance(
  x: Float[Array, "b t h w d"], y: Float[Array, "b t h w d"]
) -> losses.Scalar:
  axes = (1, 2, 3, 4)
  error, size = (jnp.square(z).mean(axes) for z in (x - y, y))
  return (error / jnp.maximum(size, 1e-12)).mean()
