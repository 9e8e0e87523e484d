"""I3D, the network whose logits FVD compares.

Follows google-deepmind/kinetics-i3d `i3d.py` (commit 0667e88), the RGB network
with 400 classes of Kinetics: TensorFlow's SAME padding, batch norm with fixed
statistics and epsilon 0.001, logits averaged over time. Its softmax is not
computed.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import precision
from dcvideogen_jax.ops import conv3d

_EPS = 1e-3
CLASSES = 400
# Pixels of the sides of a frame, and the fewest frames that leave the two that
# the last pooling takes.
SIZE = 224
SHORTEST = 9
# Widths of the convolutions of the Inception blocks: branch 0; 1a, 1b; 2a, 2b;
# 3. A block "pool" is a maximum over the given window, with stride 2 wherever
# the window is longer than 1.
BLOCKS: tuple[tuple[str, tuple[int, ...]], ...] = (
  ("mixed_3b", (64, 96, 128, 16, 32, 32)),
  ("mixed_3c", (128, 128, 192, 32, 96, 64)),
  ("pool", (3, 3, 3)),
  ("mixed_4b", (192, 96, 208, 16, 48, 64)),
  ("mixed_4c", (160, 112, 224, 24, 64, 64)),
  ("mixed_4d", (128, 128, 256, 24, 64, 64)),
  ("mixed_4e", (112, 144, 288, 32, 64, 64)),
  ("mixed_4f", (256, 160, 320, 32, 128, 128)),
  ("pool", (2, 2, 2)),
  ("mixed_5b", (256, 160, 320, 32, 128, 128)),
  ("mixed_5c", (384, 192, 384, 48, 128, 128)),
)


class I3D(nn.Module):
  """The network, from frames to the logits of its classes.

  Attributes:
    classes: number of logits.
    divisor: divides the width of every layer, for tests; 1 is I3D.
  """

  classes: int = CLASSES
  divisor: int = 1

  @nn.compact
  def __call__(
    self, video: Float[Array, "b t 224 224 3"]
  ) -> Float[Array, "b c"]:
    """Computes the logits of each clip.

    Args:
      video: float32 in [-1, 1], at least `SHORTEST` frames.
    """
    with precision.unless_set(precision.PRODUCTS):
      x = self._unit(video, "conv_1a", 64, 7, 2)
      x = _pool(x, (1, 3, 3))
      x = self._unit(x, "conv_2b", 64, 1)
      x = self._unit(x, "conv_2c", 192, 3)
      x = _pool(x, (1, 3, 3))
      for name, sizes in BLOCKS:
        if name == "pool":
          x = _pool(x, sizes)
        else:
          x = Inception(tuple(n // self.divisor for n in sizes), name=name)(x)
      # Windows of 2 frames, then the mean over windows, then the last layer:
      # all three are linear.
      x = jnp.mean(x, axis=(2, 3))
      x = jnp.mean((x[:, 1:] + x[:, :-1]) / 2, axis=1)
      return nn.Dense(self.classes, name="logits")(x)

  def _unit(self, x, name, width, kernel, stride=1):
    return Unit(width // self.divisor, kernel, stride, name=name)(x)


class Unit(nn.Module):
  """Convolution, batch norm with fixed statistics, and ReLU.

  Attributes:
    width: channels of the output.
    kernel: size along time, height and width.
    stride: along time, height and width.
  """

  width: int
  kernel: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b u i j d"]:
    """Applies the unit.

    Args:
      x: activations.
    """
    size = (self.kernel,) * 3
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (*size, x.shape[-1], self.width),
      jnp.float32,
    )
    scale, var = (
      self.param(name, nn.initializers.ones, (self.width,), jnp.float32)
      for name in ("scale", "var")
    )
    bias, mean = (
      self.param(name, nn.initializers.zeros, (self.width,), jnp.float32)
      for name in ("bias", "mean")
    )
    # The norm is linear, so it becomes part of the convolution.
    scale = scale * lax.rsqrt(var + _EPS)
    kernel = kernel * scale.reshape(1, 1, 1, 1, -1)
    bias = bias - mean * scale
    if self.stride == 1:
      edge = self.kernel // 2
      x = conv3d.conv3d(x, kernel, bias, padding=[(edge, edge)] * 3)
    else:
      x = lax.conv_general_dilated(
        x,
        kernel,
        (self.stride,) * 3,
        "SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
      )
      x = x + bias.reshape(1, 1, 1, 1, -1)
    return nn.relu(x)


class Inception(nn.Module):
  """Four branches side by side.

  Attributes:
    widths: channels of the convolutions 0, 1a, 1b, 2a, 2b and 3.
  """

  widths: Sequence[int]

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
    """Concatenates the branches.

    Args:
      x: activations.
    """
    w0, w1a, w1b, w2a, w2b, w3 = self.widths
    one = Unit(w1b, 3, name="branch_1b")(Unit(w1a, 1, name="branch_1a")(x))
    two = Unit(w2b, 3, name="branch_2b")(Unit(w2a, 1, name="branch_2a")(x))
    pooled = nn.max_pool(x, (3, 3, 3), (1, 1, 1), "SAME")
    return jnp.concatenate(
      [
        Unit(w0, 1, name="branch_0")(x),
        one,
        two,
        Unit(w3, 1, name="branch_3")(pooled),
      ],
      axis=-1,
    )


def _pool(x, window):
  strides = tuple(min(n, 2) for n in window)
  return nn.max_pool(x, window, strides, "SAME")
