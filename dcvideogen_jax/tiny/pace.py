"""How fast a stream comes, and what memory it takes, chunk by chunk."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure

Pace = Sequence[Mapping[str, Any]]


def seconds(pace: Pace) -> list[float]:
  """Seconds per frame of each chunk."""
  ends = [{"frames": 0, "seconds": 0.0}, *pace]
  return [
    (after["seconds"] - before["seconds"])
    / (after["frames"] - before["frames"])
    for before, after in zip(ends, pace, strict=False)
  ]


def memory(pace: Pace) -> list[int]:
  """The most memory so far: of the device, where it tells, or the host."""
  return [x["peak_device_bytes"] or x["peak_rss_bytes"] for x in pace]


def summary(pace: Pace) -> str:
  """One line: the first and the second half of a stream, if it has two."""
  if len(pace) < 2:
    return f"{seconds(pace)[0]:.3f} s per frame"
  half = len(pace) // 2
  parts = []
  for name, part in (("first", slice(half)), ("second", slice(half, None))):
    found = seconds(pace)[part]
    parts.append(
      f"{sum(found) / len(found):.3f} s per frame in the {name} half"
    )
  grown = memory(pace)[-1] - memory(pace)[half]
  return ", ".join(parts) + f", memory then grew by {grown / 2**20:.1f} MiB"


def plot(pace: Pace, path: pathlib.Path) -> None:
  """Seconds per frame and memory against frames."""
  picture = figure.Figure(figsize=(7, 4), layout="tight")
  upper, lower = picture.subplots(2, sharex=True)
  frames = [x["frames"] for x in pace]
  upper.plot(frames, seconds(pace), marker=".")
  upper.set_ylabel("seconds per frame")
  lower.plot(frames, [x / 2**30 for x in memory(pace)], marker=".")
  lower.set_ylabel("peak memory, GiB")
  lower.set_xlabel("frames")
  for axes in (upper, lower):
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
  picture.savefig(path, format="png", dpi=120)
