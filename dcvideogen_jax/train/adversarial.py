"""The adversarial part of DC-AE-V's training: two players in one step.

Both players move at once, from the same parameters, so that one gradient of one
sum trains both: each term sees the other player's parameters as constants.
Follows the losses of VQGAN (arXiv 2012.09841, section 3.2), of hinge GANs
(arXiv 1705.02894), R1 (arXiv 1801.04406) and LeCam (arXiv 2104.03310).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import discriminator
from dcvideogen_jax.train import losses

Logits = Float[Array, "b t h w"]

_EPS, _LARGEST = 1e-4, 1e4
# Share of the old value in the averages of logits that LeCam keeps.
_LECAM_DECAY = 0.99
_MODEL = ("width", "layers", "kernel", "spectral")
_OPTIONS = ("r1", "lecam", "optim")
NAME = "discriminator"


class Adversary:
  """The discriminator and the losses of both players.

  Its variables are "discriminator/params/..." and "discriminator/state/...":
  values that a step carries to the next one, such as LeCam's averages.
  """

  def __init__(self, config: Mapping[str, Any] | None, weight: float):
    """Builds the discriminator.

    Args:
      config: "width", "layers", "kernel" and "spectral" as for
        `discriminator.PatchDiscriminator`; "r1" and "lecam", the weights of
        these penalties; "optim", the optimiser, which `step.plan` builds. None
        for a training without discriminator.
      weight: of the generator's term, before its adaptive factor.

    Raises:
      errors.UserError: if there is a weight but no discriminator or the
        reverse, or a field does not fit.
    """
    if bool(config) != bool(weight):
      raise errors.UserError(
        "a discriminator needs both config.discriminator and a weight in "
        f"config.loss.gan, found {dict(config) if config else None} and "
        f"{weight}"
      )
    config = dict(config or {})
    if unknown := sorted(config.keys() - {*_MODEL, *_OPTIONS}):
      raise errors.UserError(
        f"config.{NAME} has the keys {', '.join((*_MODEL, *_OPTIONS))}, found "
        f"{unknown[0]!r}"
      )
    self._there, self._weight = bool(config), weight
    fields = {key: config[key] for key in _MODEL if key in config}
    self._module = discriminator.PatchDiscriminator(**fields)
    if self._module.kernel % 2 == 0:
      raise errors.UserError(
        f"config.{NAME}.kernel must be odd, found {self._module.kernel}"
      )
    self._r1, self._lecam = config.get("r1", 0.0), config.get("lecam", 0.0)

  def __bool__(self) -> bool:
    """Whether there is a discriminator."""
    return self._there

  def init(self, rng: jax.Array) -> dict[str, Any]:
    """Returns {"discriminator": random variables}, or {} without one."""
    if not self._there:
      return {}
    size = discriminator.smallest(self._module)
    found = self._module.init(rng, jnp.zeros((1, 4, size, size, 3)))
    state = dict(found.get("state", {}))
    if self._lecam:
      state["lecam"] = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
    own = {"params": found["params"]}
    return {NAME: {**own, "state": state} if state else own}

  def require(self, height: int, width: int) -> None:
    """Checks that a logit is left of frames of this size.

    Raises:
      errors.UserError: if frames are too small.
    """
    size = discriminator.smallest(self._module)
    if self._there and min(height, width) < size:
      raise errors.UserError(
        f"a discriminator of {self._module.layers} layers needs frames of at "
        f"least {size} pixels on each side, found {height}x{width}"
      )

  def generator(
    self, variables: Mapping[str, Any], output: losses.Video
  ) -> losses.Scalar:
    """Returns minus the mean logit of a reconstruction.

    The discriminator's variables are constants here.
    """
    fixed = jax.lax.stop_gradient(variables[NAME])
    return -self._logits(fixed, output)[0].mean()

  def discriminator(
    self,
    variables: Mapping[str, Any],
    video: losses.Video,
    output: losses.Video,
  ) -> tuple[losses.Scalar, dict[str, losses.Scalar]]:
    """Returns the discriminator's loss, and its parts by name.

    The hinge is half the sum of the means over logits of max(0, 1 - real) and
    max(0, 1 + fake). R1 is half the squared norm of the gradient of a clip's
    summed logits, summed over its pixels, the mean over real clips. LeCam pulls
    logits towards the averages of the other side's.

    The loss includes a term of value 0, whose gradient by a carried value is
    minus its change: `optim.build` moves carried values by exactly that.

    Args:
      variables: of the task.
      video: real clips.
      output: reconstructions, which get no gradient.
    """
    own, output = variables[NAME], jax.lax.stop_gradient(output)
    real, state = self._logits(own, video)
    fake, _ = self._logits(own, output)
    loss = hinge(real, fake)
    parts = {
      "d_loss": loss,
      "d_real": real.mean(),
      "d_fake": fake.mean(),
    }
    if self._r1:
      slope = jax.grad(lambda x: self._logits(own, x)[0].sum())(video)
      parts["r1"] = jnp.square(slope).sum((1, 2, 3, 4)).mean() / 2
      loss += self._r1 * parts["r1"]
    if self._lecam:
      averages = jax.lax.stop_gradient(own["state"]["lecam"])
      parts["lecam"] = lecam(real, fake, averages["real"], averages["fake"])
      loss += self._lecam * parts["lecam"]
      state["lecam"] = {
        name: _LECAM_DECAY * averages[name] + (1 - _LECAM_DECAY) * x.mean()
        for name, x in (("real", real), ("fake", fake))
      }
    return loss + _carry(own.get("state", {}), state), parts

  def _logits(self, own, x) -> tuple[Logits, dict[str, Any]]:
    """Returns logits and the new state of the spectral norms."""
    # XLA adds up wrongly if the columns of a picture and the input channels of
    # a kernel are both sharded.
    params = jax.tree.map(sharding.constrain, own["params"])
    state = {k: v for k, v in own.get("state", {}).items() if k != "lecam"}
    found, new = self._module.apply(
      {"params": params, "state": state}, x, mutable=["state"]
    )
    return found, dict(new.get("state", {}))

  def balanced(
    self,
    reconstruction: Callable[[losses.Video], tuple[losses.Scalar, Any]],
    variables: Mapping[str, Any],
    output: losses.Video,
    to_last: Callable[[losses.Video], Any],
  ) -> "Balanced":
    """Weighs the generator's term by gradients at the last layer.

    Its factor is the norm of the gradient of the reconstruction's loss over
    that of the adversarial term, both with respect to the last kernel: min(R /
    (G + 1e-4), 1e4). So it does not depend on how the losses are reduced. With
    micro-batches, each of them has its own factor.

    Args:
      reconstruction: output -> (loss, parts).
      variables: of the task.
      output: the reconstruction.
      to_last: gradient by the output -> gradient by the last kernel.
    """
    at = jax.lax.stop_gradient(output)
    both = jax.value_and_grad(reconstruction, has_aux=True)
    (loss, parts), pull = both(at)
    term, push = jax.value_and_grad(lambda x: self.generator(variables, x))(at)
    factor = adaptive(*(jnp.linalg.norm(to_last(g)) for g in (pull, push)))
    weight = jax.lax.stop_gradient(self._weight * factor)
    gradient = jax.lax.stop_gradient(pull + weight * push)
    # Its gradient is the sum's; so the losses are differentiated only once.
    value = jax.lax.stop_gradient(loss + weight * term)
    surrogate = (gradient * output).sum()
    value += surrogate - jax.lax.stop_gradient(surrogate)
    return Balanced(value, {**parts, "gan": term, "gan_weight": weight})


class Balanced(NamedTuple):
  """The generator's loss and its parts by name."""

  loss: losses.Scalar
  parts: dict[str, losses.Scalar]


def hinge(real: Logits, fake: Logits) -> losses.Scalar:
  """Returns half of mean(max(0, 1 - real)) + mean(max(0, 1 + fake))."""
  return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2


def lecam(
  real: Logits, fake: Logits, real_average: Any, fake_average: Any
) -> losses.Scalar:
  """Returns the mean squared excess of logits over the other side's average.

  That is mean(max(0, real - fake_average)^2) + mean(max(0, real_average -
  fake)^2).
  """
  above = jax.nn.relu(real - fake_average)
  below = jax.nn.relu(real_average - fake)
  return jnp.square(above).mean() + jnp.square(below).mean()


def adaptive(reconstruction: Any, adversarial: Any) -> losses.Scalar:
  """Returns the ratio of two gradient norms, at most 1e4."""
  return jnp.minimum(reconstruction / (adversarial + _EPS), _LARGEST)


def _carry(old: Any, new: Any) -> losses.Scalar:
  """Returns 0, with the gradient `old - new` by each leaf of `old`."""

  def one(before, after):
    change = jax.lax.stop_gradient(before - after) * before
    return (change - jax.lax.stop_gradient(change)).sum()

  return sum(jax.tree.leaves(jax.tree.map(one, old, new)), jnp.zeros(()))
