"""What the loop needs to know about what it trains."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax

from dcvideogen_jax.data import pipeline

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def _as_it_is(batch: Batch, rng: jax.Array) -> Batch:
  del rng
  return batch


def _raw(variables: Any, batch: Batch) -> Batch:
  del variables
  return batch


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
    sample by sample.
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
  draw: Callable[[Batch, jax.Array], Batch] = _as_it_is
  encode: Callable[[Any, Batch], Batch] = _raw
  trainable: Sequence[tuple[str, bool]] = ((".*", True),)
  start: Callable[[Any], Any] | None = None
  batches: Callable[..., grain.DatasetIterator] = pipeline.batches
