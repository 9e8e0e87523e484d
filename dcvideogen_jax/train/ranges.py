"""Checks the numbers of a training config before anything is built."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dcvideogen_jax import errors


class _Range(NamedTuple):
  """A condition on a number, in words and as a function."""

  words: str
  holds: Callable[[float], bool]
  whole: bool = False

  def fits(self, value: Any) -> bool:
    if isinstance(value, bool) or isinstance(value, str):
      return False
    try:
      found = operator.index(value) if self.whole else float(value)
    except (TypeError, ValueError):
      return False
    return math.isfinite(found) and self.holds(found)


_COUNT = _Range("a whole number of at least 1", lambda n: n >= 1, True)
_EVERY = _Range("a whole number of at least 0", lambda n: n >= 0, True)
_SEED = _Range(
  f"a whole number from 0 to {2**32 - 1}", lambda n: 0 <= n < 2**32, True
)
_POSITIVE = _Range("a positive number", lambda x: x > 0)
_AT_LEAST_0 = _Range("a number of at least 0", lambda x: x >= 0)
_SHARE = _Range("a number from 0 up to 1", lambda x: 0 <= x < 1)
_FINITE = _Range("a finite number", lambda x: True)

_RANGES: Mapping[_Range, str] = {
  _SEED: "seed",
  _COUNT: "steps batch_size accumulate keep lora.rank lpips.frames"
  " discriminator.width discriminator.layers discriminator.kernel",
  _EVERY: "log_every save_every statistics optim.warmup val.every",
  _POSITIVE: "optim.eps ema.steps lora.alpha",
  _AT_LEAST_0: "optim.lr optim.final optim.clip optim.decay"
  " discriminator.r1 discriminator.lecam discriminator.optim.lr",
  _SHARE: "ema.decay data.images",
}
_EVALUATOR_RANGES: Mapping[_Range, str] = {
  _SEED: "seed",
  _COUNT: "frames height width batch_size steps text_tokens",
  _EVERY: "every",
  _POSITIVE: "shift",
  _FINITE: "guidance",
}
# Sections of a config that have the same keys in every config.
_KEYS = {
  "optim": "name lr lr_scale warmup schedule final betas eps clip decay"
  " decay_mask",
  "ema": "decay ramp steps",
  "val": "data batches batch_size every",
  "lora": "rank alpha",
  "lpips": "net frames measure start",
  "decoder": "widths depths",
}


def check(config: Mapping[str, Any]) -> None:
  """Refuses numbers that make no sense in a training; fields may be missing.

  Raises:
    errors.UserError: names the number that does not fit, or an unknown key of a
      section whose keys are known.
  """
  for part, names in _KEYS.items():
    known = names.split()
    if unknown := sorted(set(config.get(part) or {}) - set(known)):
      raise errors.UserError(
        f"config.{part} has the keys {', '.join(known)}, found {unknown[0]!r}"
      )
  ranges = _by_name(_RANGES)
  if (config.get("val") or {}).get("every"):
    ranges |= _by_name({_COUNT: "val.batches val.batch_size"})
  optim = config.get("optim") or {}
  for i, _ in enumerate(optim.get("betas", ())):
    ranges[f"optim.betas.{i}"] = _SHARE
  for i, _ in enumerate(optim.get("lr_scale", ())):
    # A scale of 0 would train a parameter in vain; phases freeze parameters.
    ranges[f"optim.lr_scale.{i}.1"] = _POSITIVE
  for name in config.get("loss") or ():
    ranges[f"loss.{name}"] = _FINITE
  for name in config.get("evaluators") or ():
    ranges |= _by_name(_EVALUATOR_RANGES, f"evaluators.{name}.")
  for name, expected in ranges.items():
    value = _find(config, name)
    if value is not None and not expected.fits(value):
      raise errors.UserError(
        f"config.{name} must be {expected.words}, found {value!r}"
      )


def _by_name(
  names: Mapping[_Range, str], prefix: str = ""
) -> dict[str, _Range]:
  return {f"{prefix}{n}": r for r, text in names.items() for n in text.split()}


def _find(config: Any, name: str) -> Any:
  """Returns the value of a dotted name, or None if it is missing."""
  for key in name.split("."):
    if isinstance(config, Mapping):
      config = config.get(key)
    elif isinstance(config, list | tuple):
      config = config[int(key)]
    else:
      return None
  return config
