"""How often a model of the captioned world does what prompts ask for."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tqdm

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax.sample import pipeline
from dcvideogen_jax.tiny import scorer, world

_SHOWN = 32


class Scores(NamedTuple):
  """What was found out.

  Attributes:
    accuracy: share of right facts by kind, and of videos that are "all" right.
    tokens: of the transformer, for one video.
    seconds: per video, to "denoise" and to "decode".
    videos: prompt, seed, what was read, and whether all of it is right.
    shown: the first videos, uint8 `n t h w 3`.
    settings: of the first batch.
  """

  accuracy: dict[str, float]
  tokens: int
  seconds: dict[str, float]
  videos: list[dict[str, Any]]
  shown: np.ndarray
  settings: Mapping[str, Any]


def score(
  model: pipeline.DCVideoGen,
  count: int,
  batch_size: int,
  seed: int,
  size: tuple[int, int, int],
  at_end: bool = False,
  **options: Any,
) -> Scores:
  """Generates a video for each of `count` held-out prompts and reads it.

  Args:
    model: image to video gets a first frame of the scene.
    count: of prompts, always the same ones.
    batch_size: videos that are made at once; one with images.
    seed: added to each prompt's own.
    size: frames, height, width.
    at_end: read the last `world.MOVING_FRAMES` of longer videos, not the first;
      what has come to rest in the world by then (`world.later`) shall rest.
    **options: of `DCVideoGen.generate`.

  Raises:
    errors.UserError: as `generate` and `world.later`.
  """
  clock = clock_lib.Clock()
  questions = scorer.questions(count)
  batch_size = 1 if model.task == "i2v" else min(batch_size, count)
  frames, height, width = size
  first = max(0, frames - world.MOVING_FRAMES) if at_end else 0
  scenes = [world.later(q.scene, first, height, width) for q in questions]
  shown: list[np.ndarray] = []
  readings: list[scorer.Reading] = []
  settings: Mapping[str, Any] = {}
  starts = range(0, count, batch_size)
  for start in tqdm.tqdm(starts, unit="batch", disable=None):
    # Filled up from the front: another size would be another program.
    asked = [questions[(start + i) % count] for i in range(batch_size)]
    if model.task == "i2v":
      options["image"] = asked[0].image(height, width)
    result = model.generate(
      [q.prompt for q in asked],
      seed=[q.seed + seed for q in asked],
      frames=frames,
      height=height,
      width=width,
      one_program=True,
      phase=clock.phase,
      **options,
    )
    settings = settings or result.settings
    videos = result.video()[: count - start]
    readings += [scorer.read(video[first:]) for video in videos]
    shown += [*videos[: max(0, _SHOWN - len(shown))]]
  grid = model.latent_shape(model.size(*size))[:3]
  seconds, videos_in_all = clock.report(), len(starts) * batch_size
  return Scores(
    scorer.score(readings, scenes),
    math.prod(grid) // math.prod(model.parts.transformer.module.patch),
    {k: round(seconds[k] / videos_in_all, 4) for k in ("denoise", "decode")},
    [
      {
        "prompt": question.prompt,
        "seed": question.seed + seed,
        "read": reading._asdict(),
        "right": all(scorer.right(reading, scene)),
      }
      for question, scene, reading in zip(
        questions, scenes, readings, strict=True
      )
    ],
    np.stack(shown),
    settings,
  )
