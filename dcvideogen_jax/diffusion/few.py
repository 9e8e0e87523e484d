"""Sampling in a few steps: the noise levels of published distilled models.

A distilled model is evaluated at a few fixed noise levels, without guidance.
The levels belong to its weights: others give worse videos. Sources:

- ModelTC/LightX2V `lightx2v/models/schedulers/wan/step_distill/scheduler.py`
  (commit f8aee98), whose timesteps are not rounded. All steps are Euler's since
  commit 753a494 (24 November 2025); from 6af1958 (17 July 2025) until then each
  step but the last added fresh noise, as "renoise" does. The levels were the
  same;
- kijai/ComfyUI-WanVideoWrapper `wanvideo/schedulers/__init__.py` and LightX2V's
  configs, for the nine timesteps of CausVid;
- guandeh17/Self-Forcing `pipeline/causal_inference.py` (commit 33593df).

A few-step LoRA that this package trains says itself how it is sampled, in a
`few.json` beside its weights:

    {"levels": [1.0, 0.9, 0.75, 0.5], "solver": "renoise"}

One that was distilled for streams also says the latent frames of a chunk, as
"chunk".
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dcvideogen_jax import documents, errors, files
from dcvideogen_jax.diffusion import flow, solvers

FILE = "few.json"


class FewSteps(NamedTuple):
  """How weights that were distilled are sampled, without guidance.

  Attributes:
    levels: noise levels at which the model is called, as for `flow.explicit`.
    solver: a name in `solvers.SOLVERS`.
    weights: the LoRA or the model that was distilled for these levels.
    chunk: latent frames of the chunks that a LoRA was distilled for; None for
      whole clips, and for published presets.
  """

  levels: tuple[float, ...]
  solver: str
  weights: str
  chunk: int | None = None


def levels(steps: int, shift: float) -> tuple[float, ...]:
  """Returns evenly spaced noise levels from 1 down, shifted: 0 is left out.

  Args:
    steps: number of levels.
    shift: flow shift, as for `flow.shifted`.
  """
  even = np.arange(steps, 0, -1) / steps
  return tuple(map(float, flow.shifted(even, shift)))


_CAUSVID = (999, 934, 862, 756, 603, 410, 250, 140, 74)

PRESETS: Mapping[str, FewSteps] = {
  "lightx2v": FewSteps(
    levels(4, 5.0),
    "euler",
    "LoRA lightx2v/Wan2.1-Distill-Loras, *_lora_rank64_lightx2v_4step, of"
    " Wan2.1-T2V-14B or -I2V-14B",
  ),
  "causvid": FewSteps(
    tuple(t / flow.TRAIN_STEPS for t in _CAUSVID),
    "euler",
    "LoRA of Wan2.1-T2V-14B that was extracted from CausVid",
  ),
  "self-forcing": FewSteps(
    levels(4, 5.0),
    "renoise",
    "generator_ema of Self-Forcing, a block-causal Wan2.1-T2V-1.3B",
  ),
}


def read(directory: str | os.PathLike[str]) -> FewSteps:
  """Reads the few steps that the LoRA of a directory was distilled for.

  Raises:
    errors.UserError: if the file is missing or damaged.
  """
  path = pathlib.Path(directory) / FILE
  try:
    found = documents.parse(path.read_bytes())
  except (OSError, ValueError) as e:
    raise errors.UserError(f"{path} is not readable as JSON: {e}") from e
  keys = {"levels", "solver"}
  if not isinstance(found, Mapping) or set(found) - {"chunk"} != keys:
    raise errors.UserError(
      f'{path}: expected the keys "levels" and "solver", found {found!r}'
    )
  chunk = found.get("chunk")
  whole = isinstance(chunk, int) and not isinstance(chunk, bool)
  if chunk is not None and not (whole and chunk > 0):
    raise errors.UserError(
      f"{path}: a chunk has 1 latent frame or more, found {chunk!r}"
    )
  schedule = flow.explicit(found["levels"])
  solvers.coefficients(found["solver"], schedule.sigmas)
  return FewSteps(
    tuple(found["levels"]), found["solver"], str(directory), chunk
  )


def write(directory: files.Path, steps: FewSteps) -> None:
  """Writes the file that `read` reads, beside the weights of an adapter."""
  with files.atomic(directory / FILE) as path:
    found: dict[str, Any] = {"levels": [*steps.levels], "solver": steps.solver}
    if steps.chunk is not None:
      found["chunk"] = steps.chunk
    path.write_text(json.dumps(found) + "\n")
