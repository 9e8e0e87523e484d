"""What can be trained, by the name that a config gives it."""

from collections.abc import Callable, Mapping
from typing import Any

from dcvideogen_jax import errors
from dcvideogen_jax.train import align, autoencoders, denoise, task

TASKS: Mapping[str, Callable[[Mapping[str, Any]], task.Task]] = {
  "autoencoder": autoencoders.autoencoder,
  "wan_autoencoder": autoencoders.wan_autoencoder,
  "align": align.align,
  "denoise": denoise.denoise,
}


def build(config: Mapping[str, Any]) -> task.Task:
  """The task of a config.

  Raises:
    errors.UserError: for an unknown task, or what building it raises.
  """
  if config["task"] not in TASKS:
    raise errors.UserError(
      f"task must be one of {', '.join(TASKS)}, found {config['task']!r}"
    )
  return TASKS[config["task"]](config)
