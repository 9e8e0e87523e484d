"""The videos that `evaluate generation` makes before it measures them."""

import pathlib
from typing import Any

from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import exporting, sampling


class Export(exporting.Export):
  """The videos of prompts, or of scenes of the tiny captioned world."""

  key = "generation"

  def __init__(
    self, c: Any, seeds: list[str], folder: pathlib.Path, scenes: int | None
  ):
    """Reads the flags.

    Args:
      c: the config.
      seeds: of --seeds.
      folder: gets the first frames of scenes, for image to video.
      scenes: number of held-out scenes of the world; None for prompts.

    Raises:
      errors.UserError: as `request_list.gather`, and for scenes with more than
        one seed.
    """
    from dcvideogen_jax.sample import prompt_videos, request_list

    name = "prompts"
    if scenes is None:
      requests = sampling.requests(seeds)
    else:
      if len(seeds) != 1:
        raise errors.UserError(
          "--world_prompts takes one number in --seeds, found"
          f" {','.join(seeds)}"
        )
      name = "scenes"
      requests = _scenes(c, request_list.seed(seeds[0]), folder, scenes)
    super().__init__(c, prompt_videos.of(requests), name, {})


def _scenes(c: Any, seed: int, folder: pathlib.Path, count: int) -> list[Any]:
  """Returns the requests of held-out scenes; renders their first frames.

  They are those of `evaluate tiny`.
  """
  import PIL.Image

  from dcvideogen_jax.sample import request_list, sizes
  from dcvideogen_jax.tiny import scorer

  height, width = c.height, c.width
  if height is None:
    # The video gets the shape of its image.
    height, width = sizes.of_image(1, 1, c.area, 2)
  requests = []
  for i, question in enumerate(scorer.questions(count)):
    image = None
    if sampling.task(c) == "i2v":
      image = folder / "images" / f"{i:05d}.png"
      files.make_directory(image.parent)
      with files.atomic(image) as path:
        picture = question.image(height, width)
        PIL.Image.fromarray(picture).save(path, format="PNG")
    requests.append(
      request_list.Request(
        question.prompt,
        None,
        None if image is None else str(image),
        None,
        question.seed + seed,
      )
    )
  return requests
