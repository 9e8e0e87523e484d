"""What is trained, on which batches, and where its randomness comes from."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import grain
import jax
from jaxtyping import Array, Bool, Float32, UInt8

from dcvideogen_jax.data import pipeline

Metrics = dict[str, jax.Array]

# Which latents, and where their condition is in a `LatentBatch`.
Space = Literal["deep", "base"]
CONDITIONS: Mapping[Space, Literal["deep_condition", "base_condition"]] = {
  "deep": "deep_condition",
  "base": "base_condition",
}


class VideoBatch(TypedDict, total=False):
  """Clips that autoencoders are trained on.

  Attributes:
    video: levels of red, green and blue, 0 to 255; all frames of a batch have
      one size.
    noise: drawn; standard normal, for the posterior of Wan's autoencoder.
  """

  video: UInt8[Array, "b t h w 3"]
  noise: Float32[Array, "b T H W c"]


class LatentBatch(TypedDict, total=False):
  """Encoded clips and what they are conditioned on; tasks read some of it.

  Attributes:
    deep: latents of DC-AE-V, multiplied by its `latent_scale`.
    base: latents of Wan's autoencoder, less its `mean`, over its `std`.
    deep_condition, base_condition: of image to video, in the same space, the
      latents of the first frame, and of frames that are empty.
    text: UMT5's embeddings of the caption, zero after its end.
    image: CLIP's features of the first frame.
    sigma: drawn; the share of noise, from 0 to 1, of a sample or each chunk.
    timestep: drawn; what the transformer is told of it, from 0 to 1000; alike.
    weight: drawn; of the squared error; alike.
    noise: drawn; standard normal, like the latents that are trained on.
    clean_noise: drawn; likewise, for the copies of teacher forcing.
    drop: drawn; whether the negative prompt replaces the text.
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


# Of every task; those with encoders get raw videos and tokens, as
# `latents.conditions.clips` takes them, and make `LatentBatch` of them.
Batch = Any


class Task(NamedTuple):
  """What is trained, as pure functions.

  A step encodes the batch, draws what is random for all of it, cuts it into
  micro-batches, and averages their losses and gradients.

  init(rng) -> variables, nested dictionaries: the random start, and through
    `jax.eval_shape` all names, shapes and dtypes.
  loss_fn(variables, drawn) -> (loss, metrics), float32 scalars; deterministic
    means over the batch, so that the mean over equal parts of a batch is that
    of the batch.
  predict_fns: name -> function(variables, drawn) -> arrays with a leading
    batch axis. "measure" gives the numbers of a validation, in a dictionary; a
    NaN does not count for its sample. "reconstruct", where there is one, gives
    a uint8 video.
  draw(batch, rng) -> drawn: adds everything random, arrays with a leading
    batch axis.
  encode(variables, batch) -> batch: what frozen encoders make of raw data,
    sample by sample, in the memory that a few samples need.
  trainable: ordered (regular expression over the names of variables, bool).
  start(where) -> variables that do not start at random. `where` is a tree of
    shardings like them. None: they start as `init` gives them.
  batches(data config, *, batch_size, seed, shard_index, shard_count) ->
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
  """What everything that starts at random is drawn from, and nothing else."""
  return _keys(seed)[0]


def steps_key(seed: int) -> jax.Array:
  """What the keys of all steps are made from."""
  return _keys(seed)[1]


def validation_key() -> jax.Array:
  """What every validation draws from, whatever the seed of its run."""
  return _keys(0)[2]


def _keys(seed: int) -> jax.Array:
  return jax.random.split(jax.random.key(seed), 3)
