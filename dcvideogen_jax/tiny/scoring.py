"""How well a model of `data.world` does what held-out prompts ask for."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax.sample import pipeline
from dcvideogen_jax.tiny import held_out, semantics, world

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


class StreamScores(NamedTuple):
  """What was found out of streams.

  Attributes:
    accuracy: as of `Scores`, by the number of frames after which a clip ends.
      What has come to rest in the world (`world.later`) shall rest.
    videos: prompt, seed, and what was read by that number of frames.
    pace: of the last batch, for each chunk: frames and seconds so far, and the
      most host and device memory that had been needed.
    shown: the last clips of the first videos, uint8 `n t h w 3`.
    settings: of the first batch.
  """

  accuracy: dict[int, dict[str, float]]
  videos: list[dict[str, Any]]
  pace: list[dict[str, Any]]
  shown: np.ndarray
  settings: Mapping[str, Any]


def score_streams(
  made: pipeline.DCVideoGen,
  count: int,
  batch_size: int,
  seed: int,
  size: tuple[int, int, int],
  lengths: Sequence[int],
  **options: Any,
) -> StreamScores:
  """Streams a video for each held-out prompt and reads clips of it.

  Args:
    made, count, batch_size, seed: as for `score`.
    size: frames of a clip that is read, height, width.
    lengths: clips' lengths after which one is read; the last is the video's.
    **options: of `DCVideoGen.generate_stream`.

  Raises:
    errors.UserError: as `generate_stream` and `world.later`.
  """
  questions = held_out.questions(count)
  batch_size = 1 if made.task == "i2v" else min(batch_size, count)
  frames, height, width = size
  ends = [n * frames for n in sorted(lengths)]
  scenes = {
    end: [world.later(q.scene, end - frames, height, width) for q in questions]
    for end in ends
  }
  readings: dict[int, list[semantics.Reading]] = {end: [] for end in ends}
  shown: list[np.ndarray] = []
  settings: Mapping[str, Any] = {}
  pace: list[dict[str, Any]] = []
  for start in tqdm.trange(0, count, batch_size, unit="batch", disable=None):
    asked = [questions[(start + i) % count] for i in range(batch_size)]
    if made.task == "i2v":
      options["image"] = asked[0].image(height, width)
    stream = made.generate_stream(
      [q.prompt for q in asked],
      seed=[q.seed + seed for q in asked],
      frames=ends[-1],
      height=height,
      width=width,
      **options,
    )
    settings = settings or stream.settings
    clips, pace = _clips(stream, frames, ends)
    wanted = count - start
    for end, clip in clips.items():
      readings[end] += [semantics.read(video) for video in clip[:wanted]]
    room = max(0, _SHOWN - len(shown))
    shown += [*clips[ends[-1]][: min(wanted, room)]]
  return StreamScores(
    {end: semantics.score(x, scenes[end]) for end, x in readings.items()},
    [
      {
        "prompt": q.prompt,
        "seed": q.seed + seed,
        "read": {end: x[i]._asdict() for end, x in readings.items()},
      }
      for i, q in enumerate(questions)
    ],
    pace,
    np.stack(shown),
    settings,
  )


def _clips(stream, frames, ends):
  """The clips that end after so many frames, and when chunks were there."""
  found, pace, count, since = {}, [], 0, time.perf_counter()
  last = None
  for chunk in stream.chunks():
    count += chunk.shape[1]
    last = chunk if last is None else np.concatenate([last, chunk], axis=1)
    for end in ends:
      if end <= count and end not in found:
        stop = last.shape[1] - (count - end)
        found[end] = last[:, stop - frames : stop]
    last = last[:, -frames - chunk.shape[1] :]
    pace.append(clock_lib.arrival(count, since))
  return found, pace


def score(
  made: pipeline.DCVideoGen,
  count: int,
  batch_size: int,
  seed: int,
  size: tuple[int, int, int],
  at_end: bool = False,
  **options: Any,
) -> Scores:
  """Generates a video for each of `count` held-out prompts and reads it.

  Args:
    made: the model; image to video gets a first frame of the scene.
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
  questions = held_out.questions(count)
  batch_size = 1 if made.task == "i2v" else min(batch_size, count)
  frames, height, width = size
  first = max(0, frames - world.MOVING_FRAMES) if at_end else 0
  scenes = [world.later(q.scene, first, height, width) for q in questions]
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
      readings += [semantics.read(video[first:]) for video in videos]
      found += [*videos[: max(0, _SHOWN - len(found))]]
      bar.update(len(videos))
  module = made.parts.transformer.module
  grid = made.latent_shape(made.size(*size))[:3]
  seconds = clock.report()
  return Scores(
    semantics.score(readings, scenes),
    math.prod(grid) // math.prod(module.patch),
    {k: round(seconds[k] / made_in_all, 4) for k in ("denoise", "decode")},
    [
      {
        "prompt": q.prompt,
        "seed": q.seed + seed,
        "read": reading._asdict(),
        "right": all(
          getattr(scene, fact) == x for fact, x in reading._asdict().items()
        ),
      }
      for q, scene, reading in zip(questions, scenes, readings, strict=True)
    ],
    np.stack(found),
    settings,
  )
