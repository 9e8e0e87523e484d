"""Flags of `sample` for VBench, and the videos that they ask for."""

import pathlib
from typing import Any

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import common, distributed, vbench_flags

_AUGMENTED = flags.DEFINE_string(
  "vbench_augmented",
  None,
  "File with a text for each row of --vbench, in the same order, which the"
  " model is given instead. Files keep the names of --vbench.",
)
_IMAGES = flags.DEFINE_string(
  "vbench_images",
  None,
  "Folder of VBench's cropped images, with a folder for each ratio, for the"
  " prompts of vbench2_i2v_full_info.json.",
)
_RATIO = flags.DEFINE_string(
  "vbench_ratio",
  None,
  "Ratio of width to height of the cropped images: 1-1, 8-5, 7-4, 16-9, or that"
  " of another folder in --vbench_images. The videos have it too, unless"
  " --config has a height and a width.",
)
_SEEDS = flags.DEFINE_enum(
  "vbench_seeds",
  "drawn",
  ["drawn", "numbered"],
  "Seeds of the videos: drawn is a number of its own for each prompt and K,"
  " from a hash of both; numbered is 100000 i + K for the row i of --vbench,"
  " from 0."
  " A number in --seeds is added to numbered, and draws others for drawn.",
)
# Of the config: what a video depends on.
_SETTINGS = (
  *("frames", "height", "width", "size_rule", "condition_tail", "steps"),
  *("guidance_scale", "shift", "solver", "grid", "negative_prompt", "dtype"),
  "weights",
)


class Export:
  """The videos for a list of VBench's.

  Attributes:
    videos: `vbench.Video`s, all of them.
  """

  def __init__(self, c: Any, seeds: list[str]):
    """Reads the list and the flags.

    Args:
      c: the config; gets the height and width of the ratio.
      seeds: of --seeds.

    Raises:
      errors.UserError: for files and flags that do not fit.
    """
    from dcvideogen_jax.sample import request_list, sizes, vbench

    common.refuse_flags(
      ["prompt", "prompts", "image", "last_image", "noise"],
      "does not go with --vbench",
    )
    if len(seeds) != 1:
      raise errors.UserError(
        f"--vbench takes one number in --seeds, found {','.join(seeds)}"
      )
    listed = vbench_flags.read_list()
    augmented = _AUGMENTED.value and vbench.read_augmented(
      _AUGMENTED.value, listed
    )
    images = None
    if _IMAGES.value is not None:
      width, height = _read_ratio(_RATIO.value)
      images = vbench.find_images(_IMAGES.value, _RATIO.value, listed)
      if c.height is None and c.width is None:
        c.height, c.width = sizes.of_image(height, width, c.area, 2)
    else:
      common.refuse_flags(["vbench_ratio"], "goes with --vbench_images only")
    self.videos = vbench.videos(
      listed,
      augmented=augmented,
      images=images,
      rule=_SEEDS.value,
      base=request_list.seed(seeds[0]),
    )
    self._listed = listed
    self._settings = {name: c[name] for name in _SETTINGS}

  def made_with(self, task: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns what all videos of the folder have in common.

    Args:
      task: "t2v" or "i2v".
      given: values of flags that a video depends on.
    """
    augmented = _AUGMENTED.value and pathlib.Path(_AUGMENTED.value).name
    return {
      "list": self._listed.path.name,
      "augmented": augmented,
      "ratio": _RATIO.value,
      "seeds": _SEEDS.value,
      "task": task,
      **given,
      **self._settings,
    }

  def share(self) -> list[Any]:
    """Returns the videos of this process."""
    first, step = distributed.share() if distributed.apart() else (0, 1)
    return self.videos[first::step]

  def remaining(self, output: pathlib.Path, made_with: Any) -> list[Any]:
    """Returns the videos of this process that are not in the folder yet.

    Processes that make each video together agree on those of process 0, which
    alone has the folder.
    """
    from dcvideogen_jax.sample import vbench_resume

    vbench_resume.check_case(output, self.videos)
    mine = self.share()
    left = {*vbench_resume.remaining(output, mine, made_with)}
    flags_of_first = distributed.of_first([x in left for x in mine])
    todo = [
      x for x, is_left in zip(mine, flags_of_first, strict=True) if is_left
    ]
    count, all_of_them = len(mine) - len(todo), len(self.videos)
    whose = "" if len(mine) == all_of_them else f", of which {len(mine)} here"
    print(
      f"{self._listed.path}: {all_of_them} videos{whose}; {count} are there,"
      f" {len(todo)} to make",
      flush=True,
    )
    return todo


def asked() -> type[Export] | None:
  """Returns `Export` if --vbench is given.

  Raises:
    errors.UserError: for flags that go with --vbench only.
  """
  if vbench_flags.LIST.value is not None:
    return Export
  names = ("dimensions", "samples", "augmented", "images", "ratio", "seeds")
  common.refuse_flags(
    [f"vbench_{name}" for name in names], "goes with --vbench only"
  )
  return None


def _read_ratio(text: str | None) -> tuple[int, int]:
  """Returns width and height of a ratio such as "16-9"."""
  try:
    width, height = (int(part) for part in (text or "").split("-"))
  except ValueError:
    width = height = 0
  if width < 1 or height < 1:
    raise errors.UserError(
      "--vbench_images needs --vbench_ratio=WIDTH-HEIGHT, such as 16-9, found "
      f"{text}"
    )
  return width, height
