"""Makes a list of videos in a folder, those that are not there yet.

  OUTPUT/videos/NAME.mp4       the videos, and nothing else
  OUTPUT/settings/NAME.json    their settings

A video and its settings appear when both are complete. Several processes that
do not communicate share the list.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dcvideogen_jax.programs import distributed

# Of the config: what a video depends on.
_SETTINGS = (
  *("frames", "height", "width", "size_rule", "condition_tail", "steps"),
  *("guidance_scale", "shift", "solver", "grid", "negative_prompt", "dtype"),
  "weights",
)


class Export:
  """The videos of a list.

  Attributes:
    videos: `vbench.Video`s, all of them.
    key: where a video's settings hold what it was made for.
  """

  key: str

  def __init__(
    self,
    c: Any,
    videos: Sequence[Any],
    name: str,
    about: Mapping[str, Any],
  ):
    """Keeps what the videos depend on.

    Args:
      c: the config.
      videos: the videos.
      name: of the list, for messages.
      about: further things that all videos depend on, ready for JSON.
    """
    self.videos = videos
    self._name, self._about = name, about
    self._settings = {name: c[name] for name in _SETTINGS}

  def made_with(self, task: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns what all videos of the folder have in common.

    Args:
      task: "t2v" or "i2v".
      given: values of flags that a video depends on.
    """
    return {**self._about, "task": task, **given, **self._settings}

  def share(self) -> list[Any]:
    """Returns the videos of this process."""
    first, step = distributed.share() if distributed.apart() else (0, 1)
    return [*self.videos[first::step]]

  def remaining(self, output: pathlib.Path, made_with: Any) -> list[Any]:
    """Returns the videos of this process that are not in the folder yet.

    Processes that make each video together agree on those of process 0, which
    alone has the folder.
    """
    from dcvideogen_jax.sample import vbench_resume

    mine = self.share()
    left = {*vbench_resume.remaining(output, mine, made_with, self.key)}
    flags_of_first = distributed.of_first([x in left for x in mine])
    todo = [
      x for x, is_left in zip(mine, flags_of_first, strict=True) if is_left
    ]
    count, all_of_them = len(mine) - len(todo), len(self.videos)
    whose = "" if len(mine) == all_of_them else f", of which {len(mine)} here"
    print(
      f"{self._name}: {all_of_them} videos{whose}; {count} are there,"
      f" {len(todo)} to make",
      flush=True,
    )
    return todo
