"""What all sources of batches are given: a config, and which process asks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcvideogen_jax import errors


@dataclasses.dataclass(frozen=True)
class Process:
  """The process that reads, which has a shard of every source of its own.

  Attributes:
    seed: of the order and of what is random in an element.
    index: this process among `count`.
    count: number of processes.
  """

  seed: int
  index: int
  count: int

  @property
  def shard(self) -> slice:
    """Its elements of a source."""
    return slice(self.index, None, self.count)

  def grain_seed(self, *numbers: int) -> int:
    """A seed for Grain, which numbers elements per data set and process."""
    sequence = np.random.SeedSequence((self.seed, self.index, *numbers))
    return int(sequence.generate_state(1)[0])


def checked(
  config: Mapping[str, Any],
  sources: Sequence[str],
  required: Sequence[str],
  defaults: Mapping[str, Any],
  positive: Sequence[str] = (),
) -> dict[str, Any]:
  """The config with defaults.

  Args:
    config: "source" and more.
    sources: what "source" may be.
    required: keys that need a value, "source" among them.
    defaults: the other keys.
    positive: keys of whole numbers from 1 on, or None where that is the
      default.

  Raises:
    errors.UserError: for a key that is unknown or missing, another source, or
      another number.
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
