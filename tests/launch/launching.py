"""Programs to run, and small models and clips to run them on."""

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np

from dcvideogen_jax import convert
from dcvideogen_jax.data import video
from dcvideogen_jax.models import dc_ae_v
from tests import compiling
from tests.conftest import PRODUCTION

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {
  "latent_channels": 4,
  "widths": [8, 8, 8],
  "depths": [0, 1, 1],
  "chunk_frames": 8,
  "spatial_factor": 2,
  "temporal_factor": 4,
}


class Finished(NamedTuple):
  """How a program ended."""

  code: int
  stdout: str
  stderr: str


class Server:
  """Starts `server.py` and asks it to run programs.

  Attributes:
    cache: directory for compiled programs.
  """

  def __init__(self, directory: pathlib.Path, devices: int = 1):
    self._directory = directory
    self.cache = directory / "cache"
    self._process = subprocess.Popen(
      [sys.executable, str(pathlib.Path(__file__).parent / "server.py")],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        + (f" {compiling.FLAGS}" if not PRODUCTION else ""),
        # Programs set it, but before jax does, which is imported here already.
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "XDG_CACHE_HOME": str(self.cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      },
    )

  def run(
    self,
    program: str,
    *arguments: str,
    largest_file: int = 0,
    without: tuple[str, ...] = (),
  ) -> Finished:
    """`python -m PROGRAM ARGUMENTS`, with limits.

    Args:
      program: a module, such as "launch.convert".
      *arguments: its flags.
      largest_file: bytes that a file may have; 0 is no limit.
      without: modules that cannot be imported.
    """
    out, err = self._directory / "stdout", self._directory / "stderr"
    request = {
      "program": program,
      "arguments": arguments,
      "directory": str(self._directory),
      "stdout": str(out),
      "stderr": str(err),
      "largest_file": largest_file,
      "without": without,
    }
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    code = int(self._process.stdout.readline())
    return Finished(code, out.read_text(), err.read_text())

  def stop(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def clip(frames, height, width, seed=0):
  """Smooth moving colours with a little noise, uint8."""
  random = np.random.default_rng(seed)
  t, y, x = np.ogrid[:frames, :height, :width]
  waves = [
    np.sin((x + 2 * t) / a) + np.cos((y - t) / b)
    for a, b in random.uniform(3, 9, (3, 2))
  ]
  noise = random.normal(size=(frames, height, width, 3))
  return np.clip(128 + 55 * np.stack(waves, -1) + 3 * noise, 0, 255).astype(
    np.uint8
  )


def write_video(path, frames, fps=12.5, crf=4):
  with video.VideoWriter(path, fps=fps, crf=crf) as writer:
    writer.write(frames)
  return path


def save_model(directory, **overrides):
  """A small random model; its directory, module and variables."""
  module = dc_ae_v.build({**CONFIG, **overrides})
  example = jax.ShapeDtypeStruct((1, 8, 2, 2, 3), np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), example)
  random = np.random.default_rng(0)
  variables = jax.tree.map(lambda leaf: _random_like(leaf, random), shapes)
  convert.save(directory, "dc_ae_v", module, variables)
  return directory, module, variables


def save_decoder(directory, **overrides):
  """A smaller random decoder for `save_model`; its module and variables."""
  fields = {**CONFIG, "widths": [8, 4, 8], **overrides}
  module = dc_ae_v.build(fields)
  shapes = convert.KINDS["dc_ae_v_decoder"].init(module)
  random = np.random.default_rng(1)
  variables = jax.tree.map(lambda leaf: _random_like(leaf, random), shapes)
  convert.save(directory, "dc_ae_v_decoder", module, variables)
  return module, variables


def _random_like(leaf, random):
  """Keeps the size of activations, as far as a bias does not."""
  fan_in = max(1, np.prod(leaf.shape[:-1]))
  scale = 1 / np.sqrt(fan_in) if len(leaf.shape) > 1 else 0.5
  return (scale * random.normal(size=leaf.shape)).astype(leaf.dtype)


def complaints(stderr):
  """What a program said, but for the word on videos without loss, or odd."""
  return [x for x in stderr.splitlines() if not x.endswith("do not play")]
