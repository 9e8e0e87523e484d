"""Clips and an autoencoder for tests that encode clips beforehand."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import convert
from dcvideogen_jax.models import wan_vae
from tests import golden_data
from tests.launch import launching

TINY = launching.ROOT / "dcvideogen_jax" / "assets" / "dcvideogen_tiny"
# What is wrong with some of the clips.
SKIPPED = {
  "broken.mp4": "it is truncated",
  "gone.mp4": "it does not exist",
  "short.mp4": "it has 6 frames at 16 per second, fewer than 8",
  "silent.mp4": "it has no caption",
}


def _write_video(path, frames, height, width, seed):
  clip = launching.clip(frames, height, width, seed)
  launching.write_video(path, clip)


def write_videos(path):
  """Four clips of two shapes, and all that can be wrong with one."""
  rows = [{"file": "gone.mp4", "caption": "not there"}]
  for i, name in enumerate("abcd"):
    size = (40, 24) if name == "b" else (24, 40)
    _write_video(path / f"{name}.mp4", 8 + i, *size, i)
    texts = [f"{name} moves", f"a long look at {name} that goes on and on"]
    rows.append({"file": f"{name}.mp4", "captions": texts, "scores": [1, 2]})
  _write_video(path / "short.mp4", 5, 24, 40, 7)
  content = (path / "a.mp4").read_bytes()
  (path / "broken.mp4").write_bytes(content[: len(content) // 2])
  shutil.copy(path / "a.mp4", path / "silent.mp4")
  for name in ("short", "broken"):
    rows.append({"file": f"{name}.mp4", "caption": name})
  (path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_base_vae(directory):
  """Writes a random autoencoder like Wan's; returns module and variables."""
  module = wan_vae.build(golden_data.WAN_SMALL)
  example = convert.KINDS["wan_vae"].example(module)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *example)
  random = np.random.default_rng(0)

  def fill(x):
    fan_in = max(1, int(np.prod(x.shape[:-1])))
    scale = fan_in**-0.5 if len(x.shape) > 1 else 0.2
    return jnp.asarray(random.normal(size=x.shape) * scale, x.dtype)

  variables = jax.tree.map(fill, shapes)
  convert.save(directory, "wan_vae", module, variables)
  return module, variables


def content(directory):
  """Bytes of every file by its path in the directory."""
  return {
    path.relative_to(directory).as_posix(): path.read_bytes()
    for path in sorted(directory.rglob("*"))
    if path.is_file()
  }
