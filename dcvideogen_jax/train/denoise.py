"""Flow-matching training of a transformer, in whole or in part, as a task."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.adapt import align as align_lib
from dcvideogen_jax.adapt import forcing, phases
from dcvideogen_jax.data import latents as latents_lib
from dcvideogen_jax.diffusion import flow, training
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.train import inputs, weights
from dcvideogen_jax.train import task as task_lib

# Noise levels of the validation loss: the midpoints of five equal intervals.
BUCKETS = (0.1, 0.3, 0.5, 0.7, 0.9)


def denoise(config: Mapping[str, Any]) -> task_lib.Task:
  """Builds the task in which a transformer learns the velocity of latents.

  The variables are "params"; "lora" in phases with low-rank updates; "encoders"
  for raw video; and "negative/text", the embedding that replaces dropped texts.

  Args:
    config: "phase", a key of `phases.PHASES`; "space", "deep" or "base", the
      latents to train on; "model", "dtype", "frozen_dtype" and "lora" as for
      `weights.build`; "start" as for `weights.check_start`; "levels" as for
      `training.levels`; "forcing" as for `forcing.read`; "text_dropout", the
      share of texts that the negative prompt replaces; "negative", its
      embedding: a .npy file (s, e), a folder of `data.latents`, or None for
      zeros; "encoders" as for `inputs.Encoders`; "seed".

  Raises:
    errors.UserError: for a config that does not fit.
  """
  phase = phases.find(config["phase"])
  weights.check_start(config["start"], config["phase"])
  return task_of(Denoising(config, phase), phase)


def task_of(run: "Denoising", phase: phases.Phase) -> task_lib.Task:
  """Returns the task whose functions are the methods of `run`."""
  return task_lib.Task(
    run.init,
    run.loss_fn,
    {"measure": run.measure},
    draw=run.draw,
    encode=run.encoders.encode,
    trainable=phase.trainable,
    start=run.start,
    batches=inputs.batches,
  )


class Denoising:
  """The functions of the denoising task, which `distil` extends."""

  def __init__(self, config: Mapping[str, Any], phase: phases.Phase):
    self._config = config
    self._module = weights.build(config, phase)
    self._transformer = weights.init(
      self._module, config["start"], phase.trainable
    )
    self._space: task_lib.Space = config["space"]
    self._condition = errors.choose("space", self._space, task_lib.CONDITIONS)
    if not 0 <= config["text_dropout"] <= 1:
      raise errors.UserError(
        f"text_dropout must be within 0..1, found {config['text_dropout']}"
      )
    # Source of the embedding that replaces dropped texts; None means zeros.
    self._drops = config["negative"] if config["text_dropout"] else None
    self._forcing = forcing.read(config.get("forcing"), self._module)
    self._images = self._module.image_width is not None
    names = [self._space, "text"]
    names += [self._condition, "image"] if self._images else []
    self.encoders = inputs.Encoders(config["encoders"], names)

  def init(self, rng: jax.Array) -> dict[str, Any]:
    transformer, encoders = jax.random.split(rng)
    return {
      **self._transformer(transformer),
      **self.encoders.init(encoders),
      **self._negative(),
    }

  def _negative(self):
    """Returns the negative prompt's embedding as a variable; {} for zeros.

    An array that the step closed over would become a constant of its program.
    """
    if self._drops is None:
      return {}
    text = embedding(self._drops, self._module.text_width)
    return {"negative": {"text": text}}

  def _dropped(self, variables, text):
    """Returns the negative prompt's embedding, padded like one of `text`."""
    dropped = jnp.zeros(text.shape[1:])
    if self._drops is None:
      return dropped
    found = variables["negative"]["text"]
    latents_lib.require_tokens(len(found), len(dropped))
    return dropped.at[: len(found)].set(found)

  def start(self, where: Mapping[str, Any]) -> dict[str, Any]:
    encoders, config = self._config["encoders"] or {}, self._config
    if "text" in encoders and config["text_dropout"] and not config["negative"]:
      raise errors.UserError(
        "raw videos bring no embedding of the negative prompt, which a dropped"
        " text becomes: negative must name a .npy file or a folder of one clip"
        " or more from `dcvideogen precompute` (or text_dropout be 0)"
      )
    found = weights.load(
      self._config["start"],
      self._module,
      self._transformer,
      where,
      self._config["seed"],
    )
    placed = jax.tree.map(
      # Each process supplies the shards of its own devices.
      lambda x, to: jax.make_array_from_callback(x.shape, to, x.__getitem__),
      self._negative(),
      {key: where[key] for key in self._negative()},
    )
    return {**found, **self.encoders.load(where), **placed}

  def draw(
    self, batch: task_lib.LatentBatch, rng: jax.Array
  ) -> task_lib.LatentBatch:
    noise, level, drop, clean = jax.random.split(rng, 4)
    shape = batch[self._space].shape
    levels = training.levels(
      level,
      shape[0],
      self._config["levels"],
      self._forcing.chunks(shape[1]),
    )
    share = self._config["text_dropout"]
    drawn: task_lib.LatentBatch = {
      **batch,
      **levels._asdict(),
      "noise": jax.random.normal(noise, shape, jnp.float32),
      "drop": jax.random.bernoulli(drop, share, shape[:1]),
    }
    if self._forcing.clean:
      drawn["clean_noise"] = jax.random.normal(clean, shape, jnp.float32)
    return drawn

  def _predict(
    self,
    variables: Mapping[str, Any],
    batch: task_lib.LatentBatch,
    sigma: jax.Array,
    timestep: jax.Array,
    text: jax.Array,
  ) -> jax.Array:
    """Predicts the velocity of a batch at noise levels (b,) or (b, chunks)."""
    x0 = sharding.constrain(batch[self._space], "batch")
    frames, patch = x0.shape[1], self._forcing.patch
    sigma = self._forcing.by_frame(sigma, frames)
    timestep = self._forcing.by_frame(timestep, frames, patch)
    x = self._input(flow.add_noise(x0, batch["noise"], sigma), batch)
    weights = {k: variables[k] for k in ("params", "lora") if k in variables}
    return self._module.apply(
      weights,
      x,
      timestep,
      text,
      batch["image"] if self._images else None,
      self._clean(x0, batch),
    )

  def _clean(
    self, x0: jax.Array, batch: task_lib.LatentBatch
  ) -> wan_dit.Clean | None:
    """Returns the clean copy of the latents for teacher forcing, else None."""
    level = self._forcing.clean
    if level is None:
      return None
    if level:
      x0 = flow.add_noise(x0, batch["clean_noise"], level)
    timestep = jnp.full(x0.shape[0], level * flow.TRAIN_STEPS, jnp.float32)
    return wan_dit.Clean(self._input(x0, batch), timestep)

  def _input(self, x: jax.Array, batch: task_lib.LatentBatch) -> jax.Array:
    """Appends the mask and the image condition for image-to-video models."""
    if not self._images:
      return x
    return align_lib.condition(x, batch[self._condition])

  def loss_fn(
    self, variables: Mapping[str, Any], drawn: task_lib.LatentBatch
  ) -> tuple[jax.Array, task_lib.Metrics]:
    text = drawn["text"]
    dropped = self._dropped(variables, text)
    text = jnp.where(drawn["drop"][:, None, None], dropped[None], text)
    v = self._predict(variables, drawn, drawn["sigma"], drawn["timestep"], text)
    x0 = drawn[self._space]
    weight = self._forcing.by_frame(drawn["weight"], x0.shape[1])
    error = training.squared_error(v, x0, drawn["noise"], weight.ndim)
    return (weight * error).mean(), {"mse": error.mean()}

  def measure(
    self, variables: Mapping[str, Any], drawn: task_lib.LatentBatch
  ) -> task_lib.Metrics:
    """Measures the unweighted error at each of `BUCKETS`, dropping no text.

    All chunks of a clip have the same noise level. With teacher forcing, a
    chunk attends to the clean copies of the chunks before it.
    """

    def at(sigma):
      sigma = jnp.full(drawn["sigma"].shape[:1], sigma)
      timestep = sigma * flow.TRAIN_STEPS
      v = self._predict(variables, drawn, sigma, timestep, drawn["text"])
      return training.squared_error(v, drawn[self._space], drawn["noise"])

    found = jax.lax.map(at, jnp.asarray(BUCKETS, jnp.float32))
    buckets = zip(BUCKETS, found, strict=True)
    return {
      "loss": found.mean(axis=0),
      **{f"loss_{sigma}": errors for sigma, errors in buckets},
    }


def negative(
  source: str | os.PathLike[str] | None, tokens: int, width: int
) -> np.ndarray:
  """Returns the embedding that replaces a dropped text, float32.

  Args:
    source: a .npy file or a folder of `data.latents`; None for zeros.
    tokens: length to which the embedding is padded with zeros.
    width: of the embedding.

  Raises:
    errors.UserError: if the embedding cannot be read, has more than `tokens`
      tokens or another width.
  """
  if source is None:
    return np.zeros((tokens, width), np.float32)
  return latents_lib.padded(embedding(source, width), tokens)


@functools.lru_cache(1)
def embedding(source: str | os.PathLike[str], width: int) -> np.ndarray:
  """Reads the embedding of the negative prompt, float32 (s, width).

  Raises:
    errors.UserError: if `source` cannot be read or holds no such array.
  """
  if os.path.isdir(source):
    text = latents_lib.negative(source)
  else:
    try:
      text = np.load(source)
    except (OSError, ValueError, EOFError) as e:
      raise errors.UserError(f"negative: cannot read {source}: {e}") from e
  if getattr(text, "ndim", None) != 2 or not np.isrealobj(text):
    raise errors.UserError(
      f"negative: {source} must hold an embedding (s, e), found "
      f"{getattr(text, 'shape', type(text).__name__)}"
    )
  text = text.astype(np.float32)
  if not np.isfinite(text).all():
    raise errors.UserError(
      f"negative: {source} has numbers that are not finite"
    )
  if text.shape[1] != width:
    raise errors.UserError(
      f"negative: {source} has width {text.shape[1]}, the texts {width}"
    )
  return text
