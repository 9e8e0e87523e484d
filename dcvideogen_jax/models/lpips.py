"""LPIPS: a distance of images from the features of AlexNet or VGG-16.

Follows richzhang/PerceptualSimilarity `lpips/lpips.py` and
`lpips/pretrained_networks.py` (version 0.1.4): the trunks are torchvision's
without their classifiers, the linear layers those of LPIPS 0.1. A parameter
`conv_K` is torchvision's `features.K`, `lin_I` the I-th linear layer. Nothing
is trained here, and dropout, which training needs, is left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import precision

# Mean and deviation of ImageNet's channels, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10


class Conv(NamedTuple):
  """A convolution with a bias, followed by a ReLU.

  Attributes:
    index: torchvision's index of the layer.
    width: channels of its output.
    kernel: height and width.
    stride: along both axes.
  """

  index: int
  width: int
  kernel: int = 3
  stride: int = 1

  @property
  def padding(self) -> int:
    """Zeros on every side; AlexNet's first layer has fewer than half."""
    return min(self.kernel // 2, 2)


class Stage(NamedTuple):
  """The layers up to one of the features that are compared.

  Attributes:
    pool: size of the maximum's window, with stride 2; None for no pooling.
    convs: the convolutions that follow.
  """

  pool: int | None
  convs: Sequence[Conv]


TRUNKS: dict[str, tuple[Stage, ...]] = {
  "alex": (
    Stage(None, (Conv(0, 64, 11, 4),)),
    Stage(3, (Conv(3, 192, 5),)),
    Stage(3, (Conv(6, 384),)),
    Stage(None, (Conv(8, 256),)),
    Stage(None, (Conv(10, 256),)),
  ),
  "vgg": (
    Stage(None, (Conv(0, 64), Conv(2, 64))),
    Stage(2, (Conv(5, 128), Conv(7, 128))),
    Stage(2, (Conv(10, 256), Conv(12, 256), Conv(14, 256))),
    Stage(2, (Conv(17, 512), Conv(19, 512), Conv(21, 512))),
    Stage(2, (Conv(24, 512), Conv(26, 512), Conv(28, 512))),
  ),
}
# Pixels of the shortest side that leaves a pixel in the last feature.
SMALLEST = {"alex": 31, "vgg": 16}


class LPIPS(nn.Module):
  """The distance of pairs of images.

  Attributes:
    net: trunk, a key of `TRUNKS`.
  """

  net: str = "alex"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "n h w 3"],
    y: Float[Array, "n h w 3"],
    spatial: bool = False,
  ) -> Float[Array, " n"] | Float[Array, "n h w"]:
    """Compares images pairwise.

    Args:
      x: images in [-1, 1], float32.
      y: images in [-1, 1], float32.
      spatial: whether to return a map, enlarged to the size of the images,
        instead of its mean over positions of each feature.
    """
    with precision.unless_set(precision.PRODUCTS):
      n = x.shape[0]
      total = jnp.zeros(x.shape[:3] if spatial else n, jnp.float32)
      for i, pair in enumerate(self._features(x, y)):
        weights = self.param(
          f"lin_{i}", nn.initializers.ones, pair[0].shape[-1:], jnp.float32
        )
        one, other = map(_unit, pair)
        difference = jnp.square(one - other) @ weights
        if spatial:
          total += jax.image.resize(difference, total.shape, "linear")
        else:
          total += jnp.mean(difference, axis=(1, 2))
      return total

  def _features(self, *images):
    """Yields the features of both sides after each stage.

    The sides are computed apart, so that a gradient with respect to one of them
    costs no backward pass of the other.
    """
    shift, scale = (
      jnp.asarray(v).reshape(1, 1, 1, 3) for v in (_SHIFT, _SCALE)
    )
    sides = [(x - shift) / scale for x in images]
    for stage in TRUNKS[self.net]:
      if stage.pool:
        window = (stage.pool, stage.pool)
        sides = [nn.max_pool(x, window, (2, 2)) for x in sides]
      for conv in stage.convs:
        layer = _Conv(conv, name=f"conv_{conv.index}")
        sides = [layer(x) for x in sides]
      yield sides


def _unit(feature: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
  """Scales each position's channels to length 1."""
  norm = jnp.linalg.norm(feature, axis=-1, keepdims=True)
  return feature / (norm + _EPS)


class _Conv(nn.Module):
  """Applies a `Conv`.

  Attributes:
    shape: the layer.
  """

  shape: Conv

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
    size, width, padding = (
      self.shape.kernel,
      self.shape.width,
      self.shape.padding,
    )
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (size, size, x.shape[-1], width),
      jnp.float32,
    )
    bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
    x = lax.conv_general_dilated(
      x,
      kernel,
      (self.shape.stride,) * 2,
      [(padding, padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return nn.relu(x + bias.reshape(1, 1, 1, -1))
