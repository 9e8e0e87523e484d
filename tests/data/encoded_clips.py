"""Small folders of encoded clips; their arrays contain the clip's number."""

import numpy as np

from dcvideogen_jax.data import parts

SETTINGS = {"frames": 8, "models": {"dc_ae_v": "abc"}}
FACTS = {"latent_scale": 0.5}


def clip(number, shape=(2, 3, 4), texts=(3,), dtype=np.float32, scores=None):
  """Returns arrays that contain the clip's number, and the metadata."""
  random = np.random.default_rng(number)
  arrays = {
    "base": random.normal(size=(*shape, 2)).astype(dtype),
    "deep": random.normal(size=(*shape, 6)).astype(dtype),
    "text": [
      np.full((length, 4), 10 * number + i + 1, dtype)
      for i, length in enumerate(texts)
    ],
  }
  arrays["base"][..., 0] = number
  captions = [f"clip {number}, text {i}" for i in range(len(texts))]
  meta = {"file": f"{number}.mp4", "captions": captions, "scores": scores}
  return arrays, meta


def write(directory, clips):
  """Writes parts of five clips; `clips` are pairs (bucket, (arrays, meta))."""
  parts.begin(directory, SETTINGS)
  clips = list(clips)
  count = -(-len(clips) // 5)
  for number in range(count):
    with parts.Writer(directory, number, FACTS) as writer:
      for bucket, clip in clips[5 * number : 5 * number + 5]:
        writer.write(bucket, *clip)
  return parts.finish(directory, count)


def content(directory):
  return {
    path.relative_to(directory).as_posix(): path.read_bytes()
    for path in sorted(directory.rglob("*"))
    if path.is_file()
  }


def two_sizes(directory):
  """Writes nine clips of one size and three of another."""
  write(directory, wide_and_tall())


def wide_and_tall():
  """Returns the pairs (bucket, clip) that `two_sizes` writes."""
  wide = [("24x48", clip(i, texts=(3, 7), scores=[1, 1])) for i in range(9)]
  return wide + [("48x24", clip(i, (2, 4, 3), (2,))) for i in range(20, 23)]
