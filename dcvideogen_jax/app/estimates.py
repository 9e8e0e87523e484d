"""Estimates, as the form changes, of tokens, memory and seconds."""

import collections
from collections.abc import Mapping
from typing import Any

from dcvideogen_jax.diffusion import guidance
from dcvideogen_jax.plan import fits, formulas
from dcvideogen_jax.sample import arguments, loading, sizes

_GIB = 2**30


class Speeds:
  """FLOPs per second of denoising and decoding, measured as videos are made."""

  def __init__(self):
    self._measured: dict[str, float] = {}

  def measure(
    self, needs: formulas.Needs, steps: int, seconds: Mapping[str, float]
  ) -> None:
    """Notes how long a video took.

    Args:
      needs: of the video.
      steps: solver steps.
      seconds: of the phases "denoise" and "decode", without compilation.
    """
    for name, work in _work(needs, steps).items():
      if work and seconds.get(name):
        self._measured[name] = work / seconds[name]

  def seconds(self, needs: formulas.Needs, steps: int) -> float | None:
    """Returns how long a video takes at these speeds; None before the first."""
    work = _work(needs, steps)
    if work.keys() - self._measured.keys():
      return None
    return sum(work[name] / self._measured[name] for name in work)


def _work(needs: formulas.Needs, steps: int) -> dict[str, int]:
  work = {"denoise": steps * needs.step_flops}
  if needs.decode_flops is not None:
    work["decode"] = needs.decode_flops
  return work


def of(parts: loading.Parts, c: Any) -> formulas.Needs:
  """Returns what the video of a config takes; see `formulas.needs`.

  Raises:
    errors.UserError: for a size or a guidance scale that does not fit.
  """
  size = sizes.checked(c.frames, c.height, c.width)
  guided = guidance.needed(arguments.number(c.guidance_scale, "guidance_scale"))
  return formulas.needs(parts, size, guided=guided)


def told(
  parts: loading.Parts,
  c: Any,
  videos: int,
  device: fits.Device,
  speeds: Speeds,
) -> str:
  """Returns a line about tokens, memory and seconds.

  Args:
    parts: the model.
    c: the config.
    videos: number of videos that are asked for.
    device: where they are made.
    speeds: measured so far.
  """
  needs, weights = of(parts, c), formulas.weights(parts)
  resident = sum(weights.values())
  peak = formulas.peak(resident, needs)
  memory = f"{_size(peak)} of memory, {_size(resident)} of it weights"
  if peak > device.limit:
    memory += f": more than the {_size(device.limit)} that are free"
  seconds = speeds.seconds(needs, c.steps)
  if seconds is not None:
    time = f"about {duration(seconds)}"
  elif (
    step := fits.step_seconds(device, needs.step_flops, weights["transformer"])
  ) is not None:
    time = f"{duration(c.steps * step)} or more"
  else:
    time = "seconds are known after the first video"
  if seconds is not None and videos > 1:
    time += f" each, {duration(videos * seconds)} for {videos}"
  told = f"{needs.tokens:,} tokens · {memory} · {time}"
  if c.few is not None:
    told += (
      f" · steps and guidance are those of the few-step LoRA: {c.steps}"
      " evaluations without guidance"
    )
  if c.height % 2 or c.width % 2:
    told += " · browsers do not play videos of an odd height or width"
  return told


def duration(seconds: float) -> str:
  """Formats seconds: "0.4 s", "12 s", "3 min", "2.1 h"."""
  if seconds < 10:
    return f"{seconds:.1f} s"
  if seconds < 120:
    return f"{seconds:.0f} s"
  if seconds < 7200:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:.1f} h"


def remaining(recent: collections.deque[tuple[int, float]], total: int) -> str:
  """Returns the time that is left, from the times of the last steps.

  Args:
    recent: numbers of steps and when they were done, in seconds.
    total: number of all steps.
  """
  (first, since), (last, now) = recent[0], recent[-1]
  if last == first:
    return ""
  return f"{duration((total - last) * (now - since) / (last - first))} left"


def _size(count: int) -> str:
  if count < _GIB / 10:
    return f"{count / 2**20:.0f} MiB"
  return f"{count / _GIB:.1f} GiB"
