"""First phase: a new patch embedding learns to give the base's tokens.

Both patch embeddings embed the same clip, each from the latents of its own
autoencoder. Follows DC-Gen `dc_ai/dc_adapt/trainer.py` and
`dc_ai/dc_adapt/models/wan_video.py` (commit 562077c).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import wan_patches

# Tokens of two models on grids of their own.
Tokens = Float[Array, "b t h w d"]
Teacher = Float[Array, "b t2 h2 w2 d"]
Scalar = Float[Array, ""]
PatchEmbedding = Mapping[str, Array]


def init_patch_embed(
  rng: Array,
  patch: tuple[int, int, int],
  channels: int,
  width: int,
  latent_channels: int,
) -> dict[str, Array]:
  """Initialises a patch embedding, in float32.

  Args:
    rng: a PRNG key.
    patch: latent frames, rows and columns of a token.
    channels: input channels, including mask and condition for image to video.
    width: channels of a token.
    latent_channels: channels of the latents alone, without mask and condition.

  Returns:
    "kernel", (*patch, channels, width), Xavier uniform for the flattened
    matrix; and "bias", (width,), uniform within
    1 / sqrt(latent_channels * latents in a patch).
  """
  kernel, bias = jax.random.split(rng)
  xavier = jax.nn.initializers.xavier_uniform(in_axis=(0, 1, 2, 3))
  bound = 1 / math.sqrt(latent_channels * math.prod(patch))
  return {
    "kernel": xavier(kernel, (*patch, channels, width), jnp.float32),
    "bias": jax.random.uniform(
      bias, (width,), jnp.float32, minval=-bound, maxval=bound
    ),
  }


def tokens(
  params: PatchEmbedding,
  latents: Float[Array, "b t h w c"],
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b t2 h2 w2 d"]:
  """Embeds latents as a grid of tokens, computed in `dtype`, returned float32.

  Args:
    params: "kernel" (pt, ph, pw, c, d) and "bias" (d,).
    latents: with frames, rows and columns that are multiples of the patch's.
    dtype: dtype of the matrix product.

  Raises:
    errors.UserError: if the latents do not fit the patch embedding.
  """
  kernel = params["kernel"].astype(dtype)
  *patch, channels, width = kernel.shape
  if latents.shape[-1] != channels or any(
    n % p for n, p in zip(latents.shape[1:4], patch, strict=True)
  ):
    raise errors.UserError(
      f"the patch embedding takes {channels} channels in patches of {patch}, "
      f"found latents {latents.shape}"
    )
  patches = wan_patches.to_patches(latents.astype(dtype), patch)
  found = patches @ kernel.reshape(-1, width)
  found += params["bias"].astype(dtype)[None, None, None, None]
  return found.astype(jnp.float32)


def condition(
  latents: Float[Array, "b t h w c"], image: Float[Array, "b t h w c"]
) -> Float[Array, "b t h w c2"]:
  """Concatenates the input of image-to-video models: latents, mask, image.

  The mask is 1 on the first latent frame and 0 on the others. It has 4 channels
  for both autoencoders, because a latent frame stands for up to 4 frames.

  Args:
    latents: the latents of the clip.
    image: the encoded image, in the same latent space.

  Returns:
    The concatenation, with 2 * c + 4 channels.
  """
  mask = jnp.zeros((*latents.shape[:-1], 4), latents.dtype).at[:, 0].set(1)
  return jnp.concatenate([latents, mask, image.astype(latents.dtype)], axis=-1)


def pool(teacher: Teacher, grid: tuple[int, ...]) -> Tokens:
  """Averages the teacher's tokens onto the student's coarser grid.

  Args:
    teacher: tokens on their own grid.
    grid: frames, rows and columns of the student's tokens.

  Raises:
    errors.UserError: unless both grids have the same number of frames, and the
      teacher's rows and columns are the same whole multiple of the student's.
  """
  factor = _factor(teacher.shape[1:4], grid)
  return einops.reduce(
    teacher, "b t (h fh) (w fw) d -> b t h w d", "mean", fh=factor, fw=factor
  )


def _factor(teacher: tuple[int, ...], student: tuple[int, ...]) -> int:
  factor = teacher[1] // student[1]
  expected = (student[0], factor * student[1], factor * student[2])
  if not factor or tuple(teacher) != expected:
    raise errors.UserError(
      f"the base's tokens {tuple(teacher)} (frames, rows, columns) are no "
      f"whole multiple in space of the {tuple(student)} to be aligned"
    )
  return factor


def _mse(x: Array, y: Array) -> Scalar:
  return jnp.square(x - y).mean()


# Functions of student, teacher and upsampling method. The official names are
# downsample, upsample and average_pool, and mixed for the sum.
_LOSSES: Mapping[str, Callable[[Tokens, Teacher, str], Scalar]] = {
  "pool": lambda x, y, _: _mse(x, pool(y, x.shape[1:4])),
  # "linear" samples at half-pixel centres and repeats the edges.
  "upsample": lambda x, y, how: _mse(jax.image.resize(x, y.shape, how), y),
  "global": lambda x, y, _: _mse(x.mean((2, 3)), y.mean((2, 3))),
}
LOSSES = (*_LOSSES, "sum")
UPSAMPLINGS = ("nearest", "linear")


def loss(
  student: Tokens, teacher: Teacher, config: Mapping[str, Any]
) -> Scalar:
  """Computes the mean squared error of the student's tokens.

  Args:
    student: float32 tokens on a grid as fine as the teacher's or coarser.
    teacher: float32 tokens.
    config: "loss", one of `LOSSES`: the teacher is averaged onto the
      student's grid ("pool"), the student is upsampled to the teacher's grid
      ("upsample"), both are averaged over each frame ("global"), or the three
      are added ("sum"); and "upsample", "nearest" or "linear".

  Raises:
    errors.UserError: for another "loss" or "upsample", or for grids that do
      not fit.
  """
  kind, method = config["loss"], config["upsample"]
  if kind not in LOSSES or method not in UPSAMPLINGS:
    raise errors.UserError(
      f"align.loss must be one of {', '.join(LOSSES)} and align.upsample one "
      f"of {', '.join(UPSAMPLINGS)}, found {kind!r} and {method!r}"
    )
  _factor(teacher.shape[1:4], student.shape[1:4])
  kinds = [*reversed(_LOSSES)] if kind == "sum" else [kind]
  return sum(_LOSSES[kind](student, teacher, method) for kind in kinds)


def alignment_metrics(student: Tokens, teacher: Teacher) -> dict[str, Array]:
  """Measures, for each clip, how far the student is from the teacher.

  Returns:
    Three arrays (b,): "align_mse", the mean squared error between the student
    and the teacher averaged onto its grid; "align_variance", the variance of
    the averaged teacher's tokens within the clip; and "align_relative", the
    ratio of the two. A ratio of 0 is perfect, 1 is what the clip's mean token
    would reach, and NaN means that all tokens of the teacher are the same.

  Raises:
    errors.UserError: if the grids do not fit, as in `pool`.
  """
  teacher = pool(teacher, student.shape[1:4])
  mse = jnp.square(student - teacher).mean(axis=(1, 2, 3, 4))
  variance = teacher.var(axis=(1, 2, 3)).mean(axis=-1)
  return {
    "align_mse": mse,
    "align_variance": variance,
    "align_relative": jnp.where(variance > 0, mse / variance, jnp.nan),
  }
