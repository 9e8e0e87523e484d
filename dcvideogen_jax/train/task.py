"""The interface of training tasks: batches, functions and random keys."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import grain
import jax
from jaxtyping import Bool, Float32, Int32, UInt8

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.data import pipeline

Metrics = dict[str, jax.Array]

# The autoencoder of the latents that are trained on, and the key of the image
# condition of these latents in a `LatentBatch`.
Space = Literal["deep", "base"]
CONDITIONS: Mapping[Space, Literal["deep_condition", "base_condition"]] = {
  "deep": "deep_condition",
  "base": "base_condition",
}


class VideoBatch(TypedDict, total=False):
  """Clips that autoencoders are trained on.

  Attributes:
    video: RGB levels from 0 to 255; all clips of a batch have the same size.
    frames: numbers of the frames that LPIPS sees.
    channels: latent channels that the decoder sees, from the first on.
    noise: standard normal, for the posterior of Wan's autoencoder. `T H W`
      count latents.

  Those from `frames` on are drawn anew in each step.
  """

  video: UInt8[Array, "b t h w 3"]
  frames: Int32[Array, "b k"]
  channels: Int32[Array, " b"]
  noise: Float32[Array, "b T H W c"]


class LatentBatch(TypedDict, total=False):
  """Encoded clips and their conditions; each task reads some of the arrays.

  Those from `sigma` on are drawn anew in each step, by `Task.draw`.

  Attributes:
    deep: latents of DC-AE-V, multiplied by its `latent_scale`.
    base: latents of Wan's autoencoder, minus its `mean`, divided by its `std`.
    deep_condition, base_condition: for image to video, latents in the same
      space of a clip that shows the first frame, followed by grey frames.
    text: UMT5 embeddings of the caption, zero after its end.
    image: CLIP features of the first frame.
    sigma: noise level from 0 to 1, per sample or per chunk.
    timestep: the noise level as the transformer gets it, from 0 to 1000, per
      sample or per chunk.
    weight: of the squared error, per sample or per chunk.
    noise: standard normal, shaped like the latents that are trained on.
    clean_noise: the same, for the clean copies of teacher forcing.
    drop: whether the negative prompt replaces the text.
  """

  deep: Float32[Array, "b t h w c"]
  base: Float32[Array, "b t H W C"]
  deep_condition: Float32[Array, "b t h w c"]
  base_condition: Float32[Array, "b t H W C"]
  text: Float32[Array, "b s e"]
  image: Float32[Array, "b m f"]
  sigma: Float32[Array, "b ..."]
  timestep: Float32[Array, "b ..."]
  weight: Float32[Array, "b ..."]
  noise: Float32[Array, "b t h w c"]
  clean_noise: Float32[Array, "b t h w c"]
  drop: Bool[Array, " b"]


# The batch of any task. Tasks with encoders get raw videos and tokens, as
# `latents.conditions.clips` takes them, and make a `LatentBatch` from them.
Batch = Any


class Task(NamedTuple):
  """A training task as pure functions.

  A step encodes the batch, draws all random numbers for it, cuts it into
  micro-batches, and averages their losses and gradients.

  Attributes:
    init: (rng) -> variables, nested dictionaries with random values. With
      `jax.eval_shape` it also gives all names, shapes and dtypes.
    loss_fn: (variables, drawn) -> (loss, metrics), float32 scalars. They are
      deterministic means over the batch, so that averaging equal parts of a
      batch gives the mean of the whole batch.
    predict_fns: name -> (variables, drawn) -> arrays with a leading batch axis.
      "measure" returns a dictionary of validation metrics, in which a NaN
      leaves out its sample. The optional "reconstruct" returns a uint8 video.
    draw: (batch, rng) -> drawn, the batch and all random arrays, which have a
      leading batch axis too.
    encode: (variables, batch) -> batch. It applies the frozen encoders to raw
      data, a few samples at a time to bound memory.
    trainable: ordered (regular expression over the names of variables, bool).
    start: (where) -> variables that are not random, such as weights from files;
      `where` is a tree of shardings like the variables. None means that the
      variables start as `init` gives them.
    batches: (data config, *, batch_size, seed, shard_index, shard_count) ->
      endless, closable iterator over dictionaries of numpy arrays, whose
      position can be saved and restored.
  """

  init: Callable[[jax.Array], Any]
  loss_fn: Callable[[Any, Batch], tuple[jax.Array, Metrics]]
  predict_fns: Mapping[str, Callable[[Any, Batch], Any]]
  draw: Callable[[Batch, jax.Array], Batch] = lambda batch, rng: batch
  encode: Callable[[Any, Batch], Batch] = lambda variables, batch: batch
  trainable: Sequence[tuple[str, bool]] = ((".*", True),)
  start: Callable[[Any], Any] | None = None
  batches: Callable[..., grain.DatasetIterator] = functools.partial(
    pipeline.batches, sources=pipeline.CLIPS
  )


def start_key(seed: int) -> jax.Array:
  """Returns the key for random initial values, and for nothing else."""
  return _keys(seed)[0]


def steps_key(seed: int) -> jax.Array:
  """Returns the key from which the keys of all steps are derived."""
  return _keys(seed)[1]


def validation_key() -> jax.Array:
  """Returns the key that every validation draws from, whatever its run's seed.

  Validations of different runs therefore use the same random numbers.
  """
  return _keys(0)[2]


def _keys(seed: int) -> jax.Array:
  return jax.random.split(jax.random.key(seed), 3)
