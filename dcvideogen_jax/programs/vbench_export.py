"""Flags of `sample` for VBench, and the videos that they ask for."""

import pathlib
from typing import Any

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import common, exporting, vbench_flags

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


class Export(exporting.Export):
  """The videos for a list of VBench's."""

  key = "vbench"

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
    videos = vbench.videos(
      listed,
      augmented=augmented,
      images=images,
      rule=_SEEDS.value,
      base=request_list.seed(seeds[0]),
    )
    about = {
      "list": listed.path.name,
      "augmented": _AUGMENTED.value and pathlib.Path(_AUGMENTED.value).name,
      "ratio": _RATIO.value,
      "seeds": _SEEDS.value,
    }
    super().__init__(c, videos, str(listed.path), about)

  def remaining(self, output: pathlib.Path, made_with: Any) -> list[Any]:
    """Returns the videos of this process that are not in the folder yet."""
    from dcvideogen_jax.sample import vbench_resume

    vbench_resume.check_case(output, self.videos)
    return super().remaining(output, made_with)


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
