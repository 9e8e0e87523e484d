"""Says which published models a device holds, at which sizes and how.

The figures are estimates of `plan.formulas`; `dcvideogen plan sample` compiles.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dcvideogen_jax.plan import compiled, formulas, residency, sampling
from dcvideogen_jax.sample import presets

# Configs whose autoencoder is DC-AE-V; the memory of Wan's has no formula.
MODELS = tuple(
  name
  for name, (variant, *_) in presets.MODELS.items()
  if variant is not None and variant.startswith("dc-")
)


_part = functools.cache(compiled.part)


class Way(NamedTuple):
  """A way to load a model.

  Attributes:
    flags: of `dcvideogen sample`.
    weights: of `loading.load`.
    beside: whether the encoders stay beside the other models.
  """

  flags: tuple[str, ...]
  weights: str | None
  beside: bool


_ONCE = "--text_encoder=once"
WAYS = (
  Way((), None, True),
  Way((_ONCE,), None, False),
  Way((_ONCE, "--config.weights=int8"), "int8", False),
)


class Device(NamedTuple):
  """A device, as far as estimates depend on it.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    limit: bytes that jax may use.
    flops: FLOPs per second by dtype; empty if unknown.
    bandwidth: of the memory, in bytes per second; None if unknown.
  """

  platform: str
  limit: int
  flops: Mapping[str, float] = {}
  bandwidth: float | None = None

  @property
  def dtype(self) -> str:
    """The dtype in which programs compute there by default."""
    return "float32" if self.platform == "cpu" else "bfloat16"


class Row(NamedTuple):
  """Whether a model makes videos of a size on a device.

  Attributes:
    config: of `dcvideogen sample`, such as "dc-t2v-14b,size=720p".
    flags: further flags that it needs to fit; None if no way fits.
    bytes: least memory of the first way that fits, or of the last way.
    tokens: of the video.
    step_seconds: least time of a solver step; None if the rates are unknown.
    steps: solver steps of the config.
  """

  config: str
  flags: tuple[str, ...] | None
  bytes: int
  tokens: int
  step_seconds: float | None
  steps: int


def rows(
  device: Device,
  models: Sequence[str] = MODELS,
  heights: Sequence[str] = tuple(presets.SIZES),
) -> Iterator[Row]:
  """Yields a row for each model and size, each when it is asked for.

  Args:
    device: what the videos are made on.
    models: names of configs.
    heights: names of sizes.
  """
  for model in models:
    for height in heights:
      yield _row(device, f"{model},size={height}")


def _row(device: Device, name: str) -> Row:
  config = presets.get_config(name)
  size = sampling.size(config)
  for way in WAYS:
    parts = sampling.parts(config.variant, device.dtype, way.weights, _part)
    found = formulas.needs(parts, size, platform=device.platform)
    weights = formulas.weights(parts)
    if way.beside:
      least = formulas.peak(sum(weights.values()), found)
    else:
      halves = residency.halves(parts.space)
      least = formulas.peak_in_turn(weights, halves, found)
    if least <= device.limit:
      break
  fits = least <= device.limit
  return Row(
    name,
    way.flags if fits else None,
    least,
    found.tokens,
    step_seconds(device, found.step_flops, weights["transformer"]),
    config.steps,
  )


def step_seconds(device: Device, step_flops: int, weights: int) -> float | None:
  """Returns the least time of a solver step, by the data sheet's rates.

  Args:
    device: with its rates.
    step_flops: FLOPs of the step.
    weights: bytes of the transformer's weights.

  Returns:
    Seconds, or None if the device's rates are unknown.
  """
  if device.dtype not in device.flops:
    return None
  moved = weights / device.bandwidth if device.bandwidth else 0.0
  return max(step_flops / device.flops[device.dtype], moved)
