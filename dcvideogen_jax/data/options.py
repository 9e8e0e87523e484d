"""The arguments that all sources of batches share: a config and a process."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcvideogen_jax import errors


@dataclasses.dataclass(frozen=True)
class Process:
  """The process that reads; each process reads its own shard of a source.

  Attributes:
    seed: seed of the order of elements and of random choices in an element.
    index: number of this process, from 0.
    count: number of processes.
  """

  seed: int
  index: int
  count: int

  @property
  def shard(self) -> slice:
    """The slice that selects this process's elements of a source."""
    return slice(self.index, None, self.count)

  def grain_seed(self, *numbers: int) -> int:
    """Returns a seed for Grain, which differs for each process and `numbers`.

    Grain numbers elements from 0 in each data set and process, so that equal
    seeds would make equal random choices.
    """
    sequence = np.random.SeedSequence((self.seed, self.index, *numbers))
    return int(sequence.generate_state(1)[0])


def checked(
  config: Mapping[str, Any],
  sources: Sequence[str],
  required: Sequence[str],
  defaults: Mapping[str, Any],
  positive: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns a data config completed with defaults, after checking it.

  Args:
    config: the config, with "source" and the keys of that source.
    sources: allowed values of "source".
    required: keys that must have a value, including "source".
    defaults: the optional keys with their defaults.
    positive: keys whose value must be a whole number of at least 1; None is
      allowed where it is the default.

  Raises:
    errors.UserError: for a key that is unknown or missing, a source that is not
      allowed, or a number below 1.
  """
  unknown = sorted(config.keys() - defaults.keys() - set(required))
  missing = [key for key in required if config.get(key) in (None, "")]
  if unknown or missing:
    raise errors.UserError(
      f"the data config has unknown keys {unknown} and lacks {missing}; it "
      f"may have {[*required, *defaults]}"
    )
  if config["source"] not in sources:
    raise errors.UserError(
      f"the data source must be one of {sources}, not {config['source']!r}"
    )
  options = {**defaults, **config}
  for key in positive:
    number = options[key]
    if number is None and key in defaults and defaults[key] is None:
      continue
    if not isinstance(number, int) or number <= 0:
      raise errors.UserError(
        f"{key} of the data config must be a positive integer, not {number!r}"
      )
  return options
