"""How well a model of `data.world` does what held-out prompts ask for."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tqdm

from dcvideogen_jax.eval import held_out, semantics
from dcvideogen_jax.sample import pipeline
from launch import _clock

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
  made: pipeline.DCVideoGen,
  count: int,
  batch_size: int,
  seed: int,
  size: tuple[int, int, int],
  **options: Any,
) -> Scores:
  """Generates a video for each of `count` held-out prompts and reads it.

  Args:
    made: the model; image to video gets a first frame of the scene.
    count: of prompts, always the same ones.
    batch_size: videos that are made at once; one with images.
    seed: added to each prompt's own.
    size: frames, height, width.
    **options: of `DCVideoGen.generate`.

  Raises:
    errors.UserError: as `generate`.
  """
  clock = _clock.Clock()
  questions = held_out.questions(count)
  batch_size = 1 if made.task == "i2v" else min(batch_size, count)
  frames, height, width = size
  found, readings, made_in_all, settings = [], [], 0, {}
  with tqdm.tqdm(total=count, unit="video", disable=None) as bar:
    for start in range(0, count, batch_size):
      # Filled up from the front: another size would be another program.
      rows = [(start + i) % count for i in range(batch_size)]
      asked = [questions[i] for i in rows]
      if made.task == "i2v":
        options["image"] = asked[0].image(height, width)
      result = made.generate(
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
      made_in_all += batch_size
      readings += [semantics.read(video) for video in videos]
      found += [*videos[: max(0, _SHOWN - len(found))]]
      bar.update(len(videos))
  module = made.parts.transformer.module
  grid = made.latent_shape(made.size(*size))[:3]
  seconds = clock.report()
  return Scores(
    semantics.score(readings, [q.scene for q in questions]),
    math.prod(grid) // math.prod(module.patch),
    {k: round(seconds[k] / made_in_all, 4) for k in ("denoise", "decode")},
    [
      {
        "prompt": q.prompt,
        "seed": q.seed + seed,
        "read": reading._asdict(),
        "right": all(
          getattr(q.scene, fact) == x for fact, x in reading._asdict().items()
        ),
      }
      for q, reading in zip(questions, readings, strict=True)
    ],
    np.stack(found),
    settings,
  )
