"""Batches for transformers: encoded clips, or raw clips with encoders."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import convert, errors, sharding
from dcvideogen_jax.convert import matching, sources
from dcvideogen_jax.data import pipeline
from dcvideogen_jax.latents import conditions
from dcvideogen_jax.train import batch_parts, weights
from dcvideogen_jax.train import task as task_lib

# Kinds of frozen encoders, by the name of the array that each one makes.
_KINDS = {
  "base": "wan_vae",
  "deep": "dc_ae_v",
  "text": "umt5",
  "image": "clip_vision",
}


class Encoders:
  """The frozen encoders that a training step applies to raw video."""

  def __init__(self, config: Mapping[str, Any] | None, names: Sequence[str]):
    """Builds the modules; no weights are read.

    Args:
      config: None for clips that are encoded already. Otherwise the encoders by
        name, "base", "deep", "text" and "image", as far as they are needed:
        "path", which `convert.load` reads, and "dtype" of the parameters.
        Image-to-video conditions need "image" too.
      names: arrays that the task reads, some of `data.latents.KEYS`.

    Raises:
      errors.UserError: if an encoder is missing or its file is not recognised.
    """
    self._config = config or {}
    self._names = tuple(names)
    self._modules = {}
    needed = {name.removesuffix("_condition") for name in names}
    if any(name.endswith("_condition") for name in names):
      needed.add("image")  # With it, `conditions.clips` encodes conditions.
    for name in _KINDS if config else ():
      if name in needed:
        self._modules[name] = self._build(name)

  def _build(self, encoder: str) -> Any:
    kind = convert.KINDS[_KINDS[encoder]]
    if encoder not in self._config:
      raise errors.UserError(
        f"config.encoders needs {encoder!r}, found {', '.join(self._config)}"
      )
    path, dtype = self._config[encoder]["path"], self._config[encoder]["dtype"]
    tensors = sources.open_source(path, kind.files)
    fields = matching.find_config(_KINDS[encoder], path, None, tensors)
    dtype = weights.dtype({"dtype": dtype}, "dtype")
    try:
      return kind.build(fields, dtype=dtype, param_dtype=dtype)
    except (TypeError, ValueError) as e:
      raise errors.UserError(f"config.encoders.{encoder}: {e}") from e

  def init(self, rng: jax.Array) -> dict[str, Any]:
    """Returns {"encoders": random parameters}, or {} without encoders."""
    params: dict[str, Any] = {}
    for i, (name, module) in enumerate(self._modules.items()):
      example = convert.KINDS[_KINDS[name]].example(module)
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
      key = jax.random.fold_in(rng, i)
      params[name] = module.init(key, *zeros)["params"]
    return {"encoders": params} if params else {}

  def load(self, where: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the variables of `init` from files, sharded as in `where`.

    Raises:
      errors.UserError: if a file cannot be read or does not fit.
    """
    params = {}
    for name, module in self._modules.items():
      _, variables = convert.load(
        _KINDS[name],
        self._config[name]["path"],
        config=convert.config_of(module),
        dtype=module.param_dtype,
        sharding={"params": where["encoders"][name]},
      )
      params[name] = variables["params"]
    return {"encoders": params} if params else {}

  def encode(self, variables: Any, batch: task_lib.Batch) -> task_lib.Batch:
    """Encodes the arrays that the task reads, one clip per device at a time."""
    if not self._modules:
      return batch
    parameters = {
      name: {"params": variables["encoders"][name]} for name in self._modules
    }

    def some(clips):
      arrays = conditions.clips(self._modules, parameters, clips)
      return {name: arrays[name] for name in self._names}

    return _one_per_device(some, batch)


def _one_per_device(
  function: Callable[[task_lib.Batch], task_lib.Batch], batch: task_lib.Batch
) -> task_lib.Batch:
  """Applies a function to a batch, one sample per device at a time."""
  mesh = jax.sharding.get_abstract_mesh()
  devices = 1 if mesh.empty else sharding.batch_devices(mesh)
  rounds = len(jax.tree.leaves(batch)[0]) // devices
  encoded = jax.lax.map(function, batch_parts.cut(batch, rounds))
  return batch_parts.join(encoded)


def _noise(
  config: Mapping[str, Any],
  *,
  batch_size: int,
  seed: int,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.DatasetIterator:
  """Opens batches of random numbers, to try out a config without data."""
  shapes = {name: tuple(shape) for name, shape in config["shapes"].items()}

  def sample(number):
    rng = np.random.default_rng((seed, int(number)))
    return {
      name: rng.standard_normal(shape, np.float32)
      for name, shape in shapes.items()
    }

  numbers = grain.MapDataset.range(2**40)[shard_index::shard_count]
  dataset = numbers.map(sample).to_iter_dataset()
  return iter(dataset.batch(batch_size, drop_remainder=True))


SOURCES = (*pipeline.CAPTIONED, "noise")


def batches(config: Mapping[str, Any], **options: Any) -> grain.DatasetIterator:
  """Opens the batches of a source.

  Args:
    config: as for `data.pipeline.batches`; or with the "source" "noise", for
      random numbers, and "shapes", name -> shape of a sample's array.
    **options: as for `data.pipeline.batches`.

  Raises:
    errors.UserError: for an unknown source, or as `data.pipeline.batches` does.
  """
  source = config.get("source")
  if source not in SOURCES:
    raise errors.UserError(
      f"data.source must be one of {', '.join(SOURCES)}, found {source!r}"
    )
  if source == "noise":
    return _noise(config, **options)
  return pipeline.batches(config, sources=pipeline.CAPTIONED, **options)
