"""A discriminator of video patches, for adversarial training.

The strides and widths are those of the 3-D patch discriminator of Open-Sora 2.0
(hpcaitech/Open-Sora, commit 7ad6a96). Its batch normalisation is left out: it
would make the logits of a clip depend on the other clips of the batch, and so
on micro-batches and devices. Spectral normalisation is the alternative.
"""

import functools

import einops
import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.conv3d import conv3d

_SLOPE = 0.2
# Convolutions with a stride of 2 in time; the later ones keep the frames.
_TEMPORAL = 2
_WIDEST = 8
_EPS = 1e-12


class PatchDiscriminator(nn.Module):
  """Tells real from reconstructed video, patch by patch.

  Attributes:
    width: channels of the first layer; they double up to eight times as many.
    layers: convolutions that halve the picture. Two more follow.
    kernel: size of all kernels, an odd number.
    spectral: whether kernels are divided by their spectral norm, from one step
      of the power iteration. Its vectors are the collection "state".
  """

  width: int = 64
  layers: int = 3
  kernel: int = 3
  spectral: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w 3"]) -> Float[Array, "b T H W"]:
    """Returns a logit per patch, positive for real video.

    Args:
      x: video in [-1, 1], float32.
    """
    for i in range(self.layers + 1):
      halve = 2 if i < self.layers else 1
      strides = (halve if i < _TEMPORAL else 1, halve, halve)
      features = self.width * min(2**i, _WIDEST)
      x = self._conv(features, strides, f"conv_{i}")(x)
      x = nn.leaky_relu(x, _SLOPE)
    return self._conv(1, (1, 1, 1), "logits")(x)[..., 0]

  def _conv(self, features, strides, name):
    return _Conv(features, self.kernel, strides, self.spectral, name=name)


class _Conv(nn.Module):
  """A strided convolution, padded with zeros.

  Attributes:
    features: output channels.
    kernel: size of the kernel.
    strides: in time, rows and columns.
    spectral: as in `PatchDiscriminator`.
  """

  features: int
  kernel: int
  strides: tuple[int, int, int]
  spectral: bool

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b T H W f"]:
    shape = (*(self.kernel,) * 3, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    if self.spectral:
      kernel = self._normalised(kernel)
    x = lax.platform_dependent(
      x,
      kernel,
      cpu=functools.partial(_in_blocks, strides=self.strides),
      default=functools.partial(_strided, strides=self.strides),
    )
    return x + bias.reshape(1, 1, 1, 1, -1)

  def _normalised(self, kernel):
    """Divides a kernel by the norm of its matrix, inputs to outputs."""
    start = jnp.full(self.features, self.features**-0.5)
    state = self.variable("state", "u", lambda: start)
    matrix = kernel.reshape(-1, self.features)
    fixed = lax.stop_gradient(matrix)
    v = _unit(fixed @ lax.stop_gradient(state.value))
    u = _unit(v @ fixed)
    if not self.is_initializing() and self.is_mutable_collection("state"):
      state.value = u
    return kernel / (v @ matrix @ u)


def _strided(x, kernel, strides):
  """Convolves, padded with zeros: k // 2 on each side of each axis."""
  return lax.conv_general_dilated(
    x,
    kernel,
    strides,
    [(k // 2,) * 2 for k in kernel.shape[:3]],
    dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
  )


def _in_blocks(x, kernel, strides):
  """Computes what `_strided` does, with stride 1 over blocks of the stride.

  A block's numbers are channels, and a kernel covers whole blocks. XLA computes
  the input gradient of a strided convolution 40 times slower than the
  convolution on a CPU.
  """
  padding = []
  for axis, (k, stride) in enumerate(zip(kernel.shape, strides, strict=False)):
    # Blocks before the output's own, and taps that they have too many.
    before = -(-(k // 2) // stride)
    low = before * stride - k // 2
    x = _pad(x, axis + 1, 0, -x.shape[axis + 1] % stride)
    kernel = _pad(kernel, axis, low, -(low + k) % stride)
    blocks = kernel.shape[axis] // stride
    padding.append((before, blocks - 1 - before))
  block = dict(zip("ijk", strides, strict=True))
  x = einops.rearrange(x, "b (t i) (h j) (w k) c -> b t h w (i j k c)", **block)
  kernel = einops.rearrange(
    kernel, "(t i) (h j) (w k) c o -> t h w (i j k c) o", **block
  )
  return conv3d(x, kernel, padding=padding)


def _pad(x, axis, low, high):
  edges = [(0, 0)] * x.ndim
  edges[axis] = (low, high)
  return jnp.pad(x, edges)


def _unit(x: Float[Array, " n"]) -> Float[Array, " n"]:
  return x / jnp.maximum(jnp.linalg.norm(x), _EPS)


def smallest(module: PatchDiscriminator) -> int:
  """Returns the height and width of which a logit is left."""
  return 2**module.layers
