"""Measures how often a pipeline makes what held-out prompts ask for."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tqdm

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax.sample import pipeline
from dcvideogen_jax.tiny import scorer, world

_SHOWN = 32
# Between the seeds of one prompt, above the number of prompts.
_APART = 10_000


class Scores(NamedTuple):
  """Accuracy and speed on held-out prompts.

  Attributes:
    accuracy: share of videos with the right "colour", "shape" and "motion", and
      of those with "all" three right.
    tokens: number of the transformer's tokens for one video.
    seconds: seconds per video to "denoise" and to "decode".
    videos: for each video "prompt", "seed", "read" (the facts read from it) and
      "right" (whether all of them are).
    shown: the first videos, uint8 `n t h w 3`.
    settings: settings of the first batch.
    spread: `scorer.spread` over the seeds of each prompt; NaN for one seed.
  """

  accuracy: dict[str, float]
  tokens: int
  seconds: dict[str, float]
  videos: list[dict[str, Any]]
  shown: np.ndarray
  settings: Mapping[str, Any]
  spread: dict[str, float]


def score(
  model: pipeline.DCVideoGen,
  count: int,
  batch_size: int,
  seed: int,
  size: tuple[int, int, int],
  at_end: bool = False,
  seeds: int = 1,
  **options: Any,
) -> Scores:
  """Generates a video for each held-out prompt and scores it.

  Args:
    model: the pipeline. Image to video gets a rendered first frame of the
      scene.
    count: number of prompts; see `scorer.questions`.
    batch_size: number of videos in a batch; image to video always takes 1.
    seed: added to the seed of each prompt.
    size: frames, height and width of the videos.
    at_end: score the last `world.MOVING_FRAMES` frames of longer videos, not
      the first. A shape that has come to rest by then (`world.later`) must
      stand still.
    seeds: number of videos of each prompt, with seeds of their own.
    **options: options of `DCVideoGen.generate`.

  Raises:
    errors.UserError: as `generate` and `world.later`.
  """
  clock = clock_lib.Clock()
  questions = [
    question._replace(seed=question.seed + _APART * i)
    for question in scorer.questions(count)
    for i in range(seeds)
  ]
  count = len(questions)
  batch_size = 1 if model.task == "i2v" else min(batch_size, count)
  frames, height, width = size
  first = max(0, frames - world.MOVING_FRAMES) if at_end else 0
  scenes = [world.later(q.scene, first, height, width) for q in questions]
  shown: list[np.ndarray] = []
  readings: list[scorer.Reading] = []
  places: list[scorer.Place | None] = []
  settings: Mapping[str, Any] = {}
  starts = range(0, count, batch_size)
  for start in tqdm.tqdm(starts, unit="batch", disable=None):
    # The last batch is filled up with the first prompts: a smaller batch would
    # have to be compiled again.
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
    places += [scorer.place(video[first:]) for video in videos]
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
    scorer.spread(places[i : i + seeds] for i in range(0, count, seeds)),
  )
