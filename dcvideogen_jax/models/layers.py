"""Layers that the models share: linear maps, norms and pixel shuffles.

The channel order inside a shuffle is the reference's (DC-Gen
`dc_videogen/dc_ae_v_ops.py`, commit cae2205): channel first, then the temporal,
the height and the width factor.

Pictures on several devices. The autoencoders' activations are sharded over
clips and columns (`constrain_columns`). `ops.conv3d.conv3d_sharded` exchanges
the columns that a convolution sees beyond its device's own; everything else is
pointwise and needs no communication. If the number of columns is not a multiple
of the devices, the last devices hold fewer columns (`pad_columns`). Columns are
sharded and not rows, because `chunk_causal.Band` and `ops.conv3d` process bands
of rows one after the other.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax import sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import eight_bits
from dcvideogen_jax.models import precision as products

# Logical axes of the autoencoders' activations; see `sharding.LOGICAL`.
SPLIT = ("batch", None, None, "columns")


class Dense(nn.Module):
  """x @ kernel + bias, plus a low-rank update if `lora_rank` is not 0.

  The update is `lora_alpha / lora_rank * (x @ a) @ b` with `a` (in, rank) and
  `b` (rank, out) in the collection "lora" (Hu et al., arXiv 2106.09685). `b`
  starts at zero, so that a new update changes no bit of the output. Without the
  collection the module is the plain linear map.

  Attributes:
    features: output channels.
    use_bias: whether a bias is added.
    lora_rank: rank of the update; 0 for none.
    lora_alpha: scale of the update.
    kernel_init: initialiser of the kernel.
    precision: precision of the products, as in `jax.lax`.
    dtype: dtype of the computation.
    param_dtype: dtype of the kernel and bias; `a` and `b` are float32.
    weights: a key of `eight_bits.FORMATS` for a frozen kernel in eight bits,
      with a parameter "scale" (out,); None for one in `param_dtype`.
  """

  features: int
  use_bias: bool = True
  lora_rank: int = 0
  lora_alpha: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  precision: jax.lax.PrecisionLike = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  weights: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n f"]:
    """Applies the linear map, and the update if its variables are there.

    Args:
      x: channels last; cast to `dtype`.
    """
    shape = (x.shape[-1], self.features)
    kernel, scale = self._kernel(shape)
    bias = None
    if self.use_bias:
      bias = self.param(
        "bias", nn.initializers.zeros, shape[1:], self.param_dtype
      )
    x = x.astype(self.dtype)
    if scale is None:
      y = linear(x, kernel, bias, self.precision)
    else:
      y = eight_bits.linear(x, kernel, scale, bias)
    if self.lora_rank and (
      self.is_initializing() or self.has_variable("lora", "a")
    ):
      y += self._update(x, shape)
    return y

  def _kernel(self, shape):
    """Returns the kernel as it is stored, and its scale or None."""
    if self.weights is None:
      init = self.kernel_init
      return self.param("kernel", init, shape, self.param_dtype), None

    def part(index):
      # The two parts draw apart: a random kernel has no values to keep.
      def init(key):
        drawn = self.kernel_init(key, shape, jnp.float32)
        return eight_bits.quantise(drawn, self.weights)[index]

      return init

    return self.param("kernel", part(0)), self.param("scale", part(1))

  def _update(self, x, shape):
    rank = self.lora_rank
    # As in PEFT, `a` starts like torch's linear layers: uniform within
    # +-1 / sqrt(in).
    start = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    a, b = (
      self.variable("lora", name, init).value
      for name, init in (
        (
          "a",
          lambda: start(self.make_rng("params"), (shape[0], rank), jnp.float32),
        ),
        ("b", lambda: jnp.zeros((rank, shape[1]), jnp.float32)),
      )
    )
    update = linear(linear(x, a, None, self.precision), b, None, self.precision)
    return update * jnp.asarray(self.lora_alpha / rank, self.dtype)


def linear(
  x: Float[Array, "*n c"],
  kernel: Float[Array, "c f"],
  bias: Float[Array, " f"] | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*n f"]:
  """Computes x @ kernel + bias in the dtype of `x`.

  Gradients of float32 parameters are accumulated in float32, even if `x` is in
  half precision: contributions of tokens and of devices are not rounded before
  they are summed, as with `reduce_dtype=float32` in torch's FSDP.

  Args:
    x: channels last.
    kernel: cast to the dtype of `x` for the product.
    bias: added in the wider of the two dtypes; None for none.
    precision: precision of the product, as in `jax.lax`.
  """
  mixed = kernel.dtype == jnp.float32 != x.dtype
  y = (_mixed_matmul if mixed else products.matmul)(x, kernel, precision)
  if bias is None:
    return y
  dtype = jnp.promote_types(y.dtype, bias.dtype)
  bias = jnp.expand_dims(bias.astype(dtype), range(y.ndim - 1))
  return (y.astype(dtype) + bias).astype(y.dtype)


def _mixed_forward(x, kernel, precision):
  # A frozen kernel needs no `x` in the backward pass, a frozen `x` no kernel.
  kept = (
    x.value if kernel.perturbed else None,
    kernel.value if x.perturbed else None,
  )
  return products.matmul(x.value, kernel.value, precision), kept


def _mixed_backward(precision, kept, dy):
  x, kernel = kept
  dx = None if kernel is None else products.matmul(dy, kernel.T, precision)
  if x is None:
    return dx, None
  dkernel = jnp.einsum(
    "...c,...f->cf",
    x,
    dy,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  return dx, dkernel


_mixed_matmul = jax.custom_vjp(products.matmul, nondiff_argnums=(2,))
_mixed_matmul.defvjp(_mixed_forward, _mixed_backward, symbolic_zeros=True)


def gelu(x: Float[Array, "*n c"], approximate: bool) -> Float[Array, "*n c"]:
  """Computes GELU in float32, as PyTorch does; returns the dtype of `x`."""
  y = nn.gelu(x.astype(jnp.float32), approximate=approximate)
  return y.astype(x.dtype)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation over channels, with scale and bias.

  Computed in float32 whatever the input's dtype; returns `dtype`.
  """

  eps: float = 1e-5
  use_bias: bool = True
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """Normalises each position.

    Args:
      x: channels last.
    """
    x = x.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    return _affine(self, x, True, self.use_bias).astype(self.dtype)


class LayerNorm(nn.Module):
  """Normalisation to mean 0 and variance 1 over channels.

  Computed in float32 whatever the input's dtype; returns `dtype`. With
  `use_affine`, a scale and a bias follow.
  """

  eps: float = 1e-5
  use_affine: bool = True
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """Normalises each position.

    Args:
      x: channels last.
    """
    x = x.astype(jnp.float32)
    x -= x.mean(axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    return _affine(self, x, self.use_affine, self.use_affine).astype(self.dtype)


def _affine(module, x, use_scale, use_bias):
  """Scales and shifts the channels of float32 `x` by a module's parameters."""
  shape, dtype = x.shape[-1:], module.param_dtype
  if use_scale:
    scale = module.param("scale", nn.initializers.ones, shape, dtype)
    x *= jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
  if use_bias:
    bias = module.param("bias", nn.initializers.zeros, shape, dtype)
    x += jnp.expand_dims(bias.astype(jnp.float32), range(x.ndim - 1))
  return x


def constrain_columns(
  x: Float[Array, "b t h w c"],
) -> Float[Array, "b t h w c"]:
  """Shards clips and columns over the devices of the mesh in force."""
  return sharding.constrain(x, *SPLIT)


def pad_columns(
  x: Float[Array, "b t h w c"], group: int = 1
) -> Float[Array, "b t h v c"]:
  """Appends zero columns up to a multiple of the devices, and shards.

  A device then holds the same part of the picture before and after a shuffle,
  so that no activation is ever gathered. XLA shards uneven columns the same
  way.

  Args:
    x: returned unchanged if no mesh is in force.
    group: columns that stay together on a device; divides `w`.

  Returns:
    `x` with `v` columns, `w` or more.
  """
  mesh = jax.sharding.get_abstract_mesh()
  missing = -x.shape[3] % (group * sharding.num_shards(mesh, SPLIT[3]))
  if missing:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))
  return constrain_columns(x)


def constrain_output(x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
  """Shards a model's result; axes that do not divide evenly are replicated.

  A program cannot return uneven shards. Without this constraint XLA chooses
  another sharding, which newer versions of jax (0.12) may not be able to name.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  where = sharding.divisible_spec(mesh, x.shape, *SPLIT)
  return jax.lax.with_sharding_constraint(x, where)


def shuffle(
  x: Float[Array, "b t h w c"], factor: tuple[int, int, int]
) -> Float[Array, "b t2 h2 w2 c2"]:
  """Moves channels into frames, rows and columns.

  Args:
    x: its channels are a multiple of the product of `factor`.
    factor: output frames, rows and columns per input position.
  """
  ft, fh, fw = factor
  width = x.shape[3] * fw
  x = einops.rearrange(
    pad_columns(x),
    "b t h w (c ft fh fw) -> b (t ft) (h fh) (w fw) c",
    ft=ft,
    fh=fh,
    fw=fw,
  )
  return constrain_columns(constrain_columns(x)[:, :, :, :width])


def unshuffle(
  x: Float[Array, "b t h w c"], factor: tuple[int, int, int]
) -> Float[Array, "b t2 h2 w2 c2"]:
  """Moves frames, rows and columns into channels: the inverse of `shuffle`."""
  ft, fh, fw = factor
  width = x.shape[3] // fw
  x = einops.rearrange(
    pad_columns(x, fw),
    "b (t ft) (h fh) (w fw) c -> b t h w (c ft fh fw)",
    ft=ft,
    fh=fh,
    fw=fw,
  )
  return constrain_columns(constrain_columns(x)[:, :, :, :width])


def average_channels(
  x: Float[Array, "*n c"], features: int
) -> Float[Array, "*n f"]:
  """Averages groups of consecutive channels, down to `features` channels."""
  x = x.reshape(*x.shape[:-1], features, -1)
  return x.mean(axis=-1, dtype=jnp.float32).astype(x.dtype)


def repeat_channels(
  x: Float[Array, "*n c"], features: int
) -> Float[Array, "*n f"]:
  """Repeats each channel consecutively, up to `features` channels."""
  return jnp.repeat(x, features // x.shape[-1], axis=-1)
