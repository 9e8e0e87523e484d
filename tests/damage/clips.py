"""Clips that were encoded or prepared, and the runs of trainings."""

import contextlib

import numpy as np

from dcvideogen_jax import checkpoint, tree
from dcvideogen_jax.data import latents, parts, pipeline, records
from dcvideogen_jax.train import export, step
from tests.adapt import runs
from tests.damage import reading
from tests.data import encoded_clips, recordings
from tests.train import finished

_BATCHES = 3


def _encoded(directory):
  clips = encoded_clips.wide_and_tall()[:6]
  encoded_clips.write(directory, clips)
  parts.write_negative(directory, np.ones((3, 4), np.float32))


def _drawn(iterator):
  """Some batches, by number and name."""
  with contextlib.closing(iterator):
    return {
      f"{i}/{name}": array
      for i in range(_BATCHES)
      for name, array in next(iterator).items()
    }


def _read_encoded(directory):
  config = {"source": "latents", "path": str(directory), "text_tokens": 8}
  index = latents.read_index(directory)
  return {
    "facts": repr(index["facts"]),
    "negative": latents.negative(directory),
    **_drawn(pipeline.batches(config, batch_size=2, seed=0, num_threads=0)),
  }


def _read_parts(directory):
  """As the command does that goes on with a folder."""
  parts.begin(directory, encoded_clips.SETTINGS)
  (directory / latents.INDEX).unlink()
  return {"index": repr(parts.finish(directory, 2)), **_read_encoded(directory)}


def _shards(directory):
  clips = [recordings.clip(4, 8, 8, seed) for seed in range(4)]
  records.write_shards(clips, directory / "clips", clips_per_shard=2)


def _read_shards(directory):
  config = {
    "source": "records",
    "path": str(directory / "clips"),
    "frames": 4,
    "height": 8,
    "width": 8,
  }
  return _drawn(pipeline.batches(config, batch_size=2, seed=0, num_threads=0))


# --- runs --------------------------------------------------------------------


def _run(directory):
  config = runs.config("scratch", "t2v", lora={"rank": 3, "alpha": 5.0})
  finished.write(directory / "run", config)


def _continued(directory):
  """The state that the same command goes on from."""
  config = finished.COMMON | runs.config("scratch", "t2v")
  plan = step.plan(config)
  with (
    contextlib.closing(
      plan.task.batches(config["data"], batch_size=8, seed=0)
    ) as data,
    checkpoint.Checkpointer(directory / "run" / "checkpoints") as saver,
  ):
    found = saver.restore(plan.state, data)
    return {
      "step": found.step,
      "meta": repr(found.meta),
      "data": repr(data.get_state()),
      **{n: np.asarray(x) for n, x in tree.flatten(found.state).items()},
    }


def _exported(directory):
  found = export.load(directory / "run")
  return {
    "step": found.step,
    **{n: np.asarray(x) for n, x in tree.flatten(found.params).items()},
  }


INPUTS = (
  reading.Input(
    "encoded index",
    "index.json",
    "json",
    _encoded,
    _read_encoded,
    "values",
    ("facts", r"shapes\.\w+ is (missing|called)", "comes twice"),
  ),
  reading.Input(
    "encoded records",
    "part-*/*.array_record",
    "bytes",
    _encoded,
    _read_encoded,
  ),
  reading.Input(
    "negative prompt",
    "negative.safetensors",
    "safetensors",
    _encoded,
    _read_encoded,
    "values",
    (r"dtype of text.0 is '(F32|I32)'",),
  ),
  reading.Input(
    "encoded part",
    "part-*/part.json",
    "json",
    _encoded,
    _read_parts,
    "values",
    writes=True,
  ),
  reading.Input(
    "encoded settings",
    "settings.json",
    "json",
    _encoded,
    _read_parts,
    "values",
    writes=True,
  ),
  reading.Input(
    "clips", "clips/*.array_record", "bytes", _shards, _read_shards
  ),
  reading.Input(
    "checkpoint", "run/checkpoints/**/*", "bytes", _run, _continued, writes=True
  ),
  reading.Input("run's config", "run/config.json", "json", _run, _exported),
)
