"""What the numbers of a training config may be, checked before all else."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dcvideogen_jax import errors


class _Range(NamedTuple):
  """What a number has to be, in words, and whether it is."""

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

_NUMBERS: Mapping[str, _Range] = {
  "seed": _SEED,
  "steps": _COUNT,
  "batch_size": _COUNT,
  "accumulate": _COUNT,
  "log_every": _EVERY,
  "save_every": _EVERY,
  "keep": _COUNT,
  "statistics": _EVERY,
  "optim.lr": _AT_LEAST_0,
  "optim.warmup": _EVERY,
  "optim.final": _AT_LEAST_0,
  "optim.eps": _POSITIVE,
  "optim.clip": _AT_LEAST_0,
  "optim.decay": _AT_LEAST_0,
  "ema.decay": _SHARE,
  "ema.steps": _POSITIVE,
  "val.every": _EVERY,
  "lora.rank": _COUNT,
  "lora.alpha": _POSITIVE,
}
_OF_VALIDATION = {"val.batches": _COUNT, "val.batch_size": _COUNT}
_OF_AN_EVALUATOR = {
  "every": _EVERY,
  "frames": _COUNT,
  "height": _COUNT,
  "width": _COUNT,
  "batch_size": _COUNT,
  "steps": _COUNT,
  "shift": _POSITIVE,
  "guidance": _FINITE,
  "seed": _SEED,
  "text_tokens": _COUNT,
}
# Parts whose keys are the same in every config.
_KEYS = {
  "optim": "name lr lr_scale warmup schedule final betas eps clip decay"
  " decay_mask",
  "ema": "decay ramp steps",
  "val": "data batches batch_size every",
  "lora": "rank alpha",
}


def check(config: Mapping[str, Any]) -> None:
  """Refuses numbers that no training can mean; what is not there is not read.

  Raises:
    errors.UserError: names the one that does not fit, or an unknown key of a
      part whose keys are known.
  """
  for part, names in _KEYS.items():
    known = names.split()
    if unknown := sorted(set(config.get(part) or {}) - set(known)):
      raise errors.UserError(
        f"config.{part} has the keys {', '.join(known)}, found {unknown[0]!r}"
      )
  ranges = dict(_NUMBERS)
  if (config.get("val") or {}).get("every"):
    ranges |= _OF_VALIDATION
  optim = config.get("optim") or {}
  for i, _ in enumerate(optim.get("betas", ())):
    ranges[f"optim.betas.{i}"] = _SHARE
  for i, _ in enumerate(optim.get("lr_scale", ())):
    # 0 would be a parameter that is trained for nothing: phases freeze.
    ranges[f"optim.lr_scale.{i}.1"] = _POSITIVE
  for name in config.get("loss") or ():
    ranges[f"loss.{name}"] = _FINITE
  for name in config.get("evaluators") or ():
    ranges |= {f"evaluators.{name}.{k}": r for k, r in _OF_AN_EVALUATOR.items()}
  for name, expected in ranges.items():
    value = _find(config, name)
    if value is not None and not expected.fits(value):
      raise errors.UserError(
        f"config.{name} must be {expected.words}, found {value!r}"
      )


def _find(config: Any, name: str) -> Any:
  """The value of a dotted name; None where there is none."""
  for key in name.split("."):
    if isinstance(config, Mapping):
      config = config.get(key)
    elif isinstance(config, list | tuple):
      config = config[int(key)]
    else:
      return None
  return config
