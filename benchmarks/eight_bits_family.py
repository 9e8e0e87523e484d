"""The tiny family with weights in eight bits: videos that are right, and PSNR.

  python3 -m benchmarks.eight_bits_family --task=t2v --prompts=400

samples the held-out prompts of the tiny captioned world in float32, with the
kernels of transformer and text encoder in int8 and in float8, and in bfloat16.
It prints the share of videos that are right, and the PSNR of the first videos
to those in float32 that began with the same noise.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dcvideogen_jax.eval import images
from dcvideogen_jax.sample import model_names, pipeline
from dcvideogen_jax.tiny import evaluation

# Name of a row -> options of `DCVideoGen.from_pretrained`.
ROWS: dict[str, dict[str, Any]] = {
  "float32": {"dtype": jnp.float32},
  "int8": {"dtype": jnp.float32, "weights": "int8"},
  "float8": {"dtype": jnp.float32, "weights": "float8"},
  "bfloat16": {"dtype": jnp.bfloat16},
}
# The settings with which the results page scores the family.
SETTINGS = {"steps": 16, "guidance_scale": 3.0, "shift": 3.0}
SIZE = (16, 64, 64)


class Row(NamedTuple):
  """One row of the table.

  Attributes:
    name: a key of `ROWS`.
    accuracy: as in `evaluation.Scores`.
    agree: share of the prompts at which this row and float32 are both right or
      both wrong.
    psnr: dB of the first videos, each over all its frames; none for float32.
  """

  name: str
  accuracy: dict[str, float]
  agree: float
  psnr: np.ndarray


def measure(task: str, prompts: int, batch_size: int = 25) -> Iterator[Row]:
  """Yields the rows, each when it is asked for.

  Args:
    task: "t2v" or "i2v".
    prompts: number of held-out prompts.
    batch_size: number of videos in a batch, for text to video.
  """
  exact = None
  for name, options in ROWS.items():
    model = pipeline.DCVideoGen.from_pretrained(
      model_names.pipeline("tiny"), task=task, **options
    )
    found = evaluation.score(model, prompts, batch_size, 0, SIZE, **SETTINGS)
    exact = exact or found
    pairs = zip(found.videos, exact.videos, strict=True)
    yield Row(
      name,
      found.accuracy,
      float(np.mean([a["right"] == b["right"] for a, b in pairs])),
      _psnr(exact.shown, found.shown) if found is not exact else np.zeros(0),
    )


def _psnr(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
  """Returns the PSNR of each video: its frames as one tall image."""
  tall = (len(expected), -1, *expected.shape[3:])
  return images.psnr(expected.reshape(tall), found.reshape(tall))


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--task", choices=["t2v", "i2v"], default="t2v")
  parser.add_argument("--prompts", type=int, default=400)
  asked = parser.parse_args()
  print(f"{asked.task}, {asked.prompts} prompts")
  for row in measure(asked.task, asked.prompts):
    shares = ", ".join(f"{k} {100 * x:.2f} %" for k, x in row.accuracy.items())
    line = f"{row.name:8} {shares}; as float32 {100 * row.agree:.2f} %"
    if row.psnr.size:
      line += (
        f"; PSNR of {row.psnr.size} videos: mean {row.psnr.mean():.2f}, "
        f"{row.psnr.min():.2f} to {row.psnr.max():.2f} dB"
      )
    print(line, flush=True)


if __name__ == "__main__":
  main()
