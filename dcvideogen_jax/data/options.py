"""Data configs are read alike, whatever they are of."""

from collections.abc import Mapping, Sequence
from typing import Any

from dcvideogen_jax import errors


def checked(
  config: Mapping[str, Any],
  sources: Sequence[str],
  required: Sequence[str],
  defaults: Mapping[str, Any],
) -> dict[str, Any]:
  """The config with defaults.

  Args:
    config: "source" and more.
    sources: what "source" may be.
    required: keys that need a value, "source" among them.
    defaults: the other keys.

  Raises:
    errors.UserError: for a key that is unknown or missing, or another source.
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
  return {**defaults, **config}
