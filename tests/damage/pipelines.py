"""What lies beside the weights of a whole model."""

import functools
import json

from dcvideogen_jax.sample import loading
from tests.damage import reading
from tests.sample import published

_TEXT_TOKENS = (
  *reading.MISSING,
  r"text_tokens is [1-9]\d*$",
  "are swapped",
  " is as ",
)
_SCHEDULE = (
  *reading.MISSING,
  "_diffusers_version",
  r"flow_shift is (0\.5|1|3\.0|\d+)$",
)

_TASK = "t2v"


def _pipeline(directory):
  published.write(directory, "elsewhere", "dc_t2v")
  path = directory / "parts.json"
  said = json.loads(path.read_text())
  # Relative, as the directory is copied.
  said["image_encoder"] = "shared/clip"
  scheduler = "scheduler/scheduler_config.json"
  path.write_text(
    json.dumps({**said, "text_tokens": 32, "scheduler": scheduler})
  )
  # Weights are damaged elsewhere, and take time.
  for weights in directory.rglob("*.safetensors"):
    weights.write_bytes(b"")


@functools.cache
def _known(kind):
  made = published.model(kind, "dc_t2v" if kind == "wan_dit" else None)
  return made.module, made.variables


def _read_pipeline(directory):
  parts = loading.load(
    directory,
    task=_TASK,
    load_model=lambda kind, source, **_: _known(kind),
  )
  ids, mask = parts.texts.tokenizer(["a cat", "Ein längerer Text"], 16)
  schedule = parts.options.schedule(4)
  return {
    "files": [
      f"{name} {file.removeprefix(str(directory))}"
      for name, file in parts.files.items()
    ],
    "options": repr(parts.options),
    "length": parts.texts.length,
    "ids": ids,
    "mask": mask,
    "sigmas": schedule.sigmas,
    "timesteps": schedule.timesteps,
  }


INPUTS = tuple(
  reading.Input(name, target, "json", _pipeline, _read_pipeline, "values", free)
  for name, target, free in (
    ("parts.json", "parts.json", _TEXT_TOKENS),
    ("scheduler", "scheduler/*.json", _SCHEDULE),
    # Any tokenizer of this kind may be one.
    ("tokenizer", "tokenizer/tokenizer.json", (".*",)),
  )
)
