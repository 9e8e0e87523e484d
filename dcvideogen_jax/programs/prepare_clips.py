"""Makes the training or evaluation clips of the tiny autoencoder.

  python -m launch.prepare_clips --output=DIR
  python -m launch.prepare_clips --split=heldout --output=DIR

Fetches the files of dcvideogen_jax/data/manifest.json. The training split is
24-frame clips of 96x96 from the videos and from pans over the photographs, in
ArrayRecord shards under DIR. The held-out split is 64-frame clips of 64x64
under DIR/frames64, and the first 16 frames of each under DIR/frames16.
The same flags give the same clips.
"""

import collections
import contextlib
import dataclasses
import fnmatch
import json
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np
import tqdm
from absl import flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.data import records, stills, video
from dcvideogen_jax.tiny import clips, fetch, synthetic

_OUTPUT = flags.DEFINE_string(
  "output", None, "Folder to make; must not exist yet.", required=True
)
_SPLIT = flags.DEFINE_enum("split", "train", fetch.SPLITS, "Which files.")
_CLIPS = flags.DEFINE_integer(
  "clips", None, "About how many; 5000 (train) or 48 (heldout)."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Which places of the videos.", lower_bound=0
)
_EXCLUDE = flags.DEFINE_multi_string(
  "exclude", [], "Leave out manifest files of this name (may have * and ?)."
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a split is cut: see `clips.sample`."""

  clips: int
  frames: int
  size: int
  short_sides: tuple[int, ...]
  strides: tuple[int, ...]


RECIPES = {
  "train": Recipe(5000, 24, 96, (96, 128, 160, 208, 256), (1, 2, 3)),
  "heldout": Recipe(48, 64, 64, (64, 96, 144), (1,)),
}
# Photographs hold most of the textures, though their motion is made up.
_PHOTO_SHARE = 0.3


def _quotas(paths: list[pathlib.Path], split: str, total: int) -> list[int]:
  """Clips per file: photographs alike, training videos by their length."""
  photo = np.array([video.is_image(p) for p in paths])
  weight = np.ones(len(paths))
  if split == "train":
    for i in np.flatnonzero(~photo):
      weight[i] = video.probe(paths[i]).frames
  if photo.any() and not photo.all():
    weight[photo] *= _PHOTO_SHARE / weight[photo].sum()
    weight[~photo] *= (1 - _PHOTO_SHARE) / weight[~photo].sum()
  edges = np.r_[0, weight.cumsum() / weight.sum()] * total
  return np.diff(np.rint(edges).astype(int)).tolist()


def _cut(
  path: pathlib.Path, count: int, recipe: Recipe, seed: int
) -> Iterator[np.ndarray]:
  """Clips of one file; its name and the seed decide which."""
  entropy = [seed, zlib.crc32(path.name.encode())]
  rng = np.random.default_rng(entropy)
  if not video.is_image(path):
    yield from clips.sample(
      path,
      rng,
      count,
      frames=recipe.frames,
      size=recipe.size,
      short_sides=recipe.short_sides,
      strides=recipe.strides,
    )
    return
  image = stills.read(path)
  for _ in range(count):
    yield synthetic.ken_burns(
      image, int(rng.integers(2**31)), recipe.frames, recipe.size, recipe.size
    )


def _chosen(split: str) -> list[str]:
  """Names of a split that --exclude leaves."""
  names = [
    name
    for name in fetch.names(split)
    if not any(fnmatch.fnmatch(name, pattern) for pattern in _EXCLUDE.value)
  ]
  if not names:
    raise errors.UserError(f"--exclude leaves no file of the {split} split")
  return names


def _make(split: str, total: int, seed: int):
  """Yields (manifest name, clip)."""
  with tqdm.tqdm(_chosen(split), desc="fetching", unit="file") as bar:
    paths = {name: fetch.fetch(name) for name in bar}
  quotas = _quotas(list(paths.values()), split, total)
  with tqdm.tqdm(total=total, desc="cutting", unit="clip") as bar:
    for (name, path), quota in zip(paths.items(), quotas, strict=True):
      bar.set_postfix_str(name, refresh=False)
      for clip in _cut(path, quota, RECIPES[split], seed):
        bar.update()
        yield name, clip


def _sources(counts: dict[str, int]) -> str:
  """What the clips were made from, with the credit that licences ask for."""
  rows = {}
  for name, count in counts.items():
    entry = fetch.manifest()[name]
    rows[name] = {
      "clips": count,
      "sha256": entry.sha256,
      "licence": entry.licence,
      "attribution": entry.attribution,
    }
  table = {"seed": _SEED.value, "sources": rows}
  return json.dumps(table, indent=2, ensure_ascii=False)


def main(argv):
  del argv
  output, split = pathlib.Path(_OUTPUT.value), _SPLIT.value
  total = RECIPES[split].clips if _CLIPS.value is None else _CLIPS.value
  if total <= 0:
    raise errors.UserError(f"--clips must be positive, not {total}")
  records.require_empty(output)
  counts = collections.Counter()

  def counted(made):
    for name, clip in made:
      counts[name] += 1
      yield clip

  def extra():
    return {"sources.json": _sources(counts)}

  with contextlib.closing(_make(split, total, _SEED.value)) as made:
    if split == "train":
      number = records.write_shards(counted(made), output, extra=extra)
    else:
      whole = list(counted(made))
      files.make_directory(output)
      records.write_shards(whole, output / "frames64", extra=extra)
      first = (clip[:16] for clip in whole)
      number = records.write_shards(first, output / "frames16", extra=extra)
  print(f"{number} clips from {len(counts)} files in {output}")
