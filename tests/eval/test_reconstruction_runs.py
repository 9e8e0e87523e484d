"""All metrics of reconstructions, as a run records and reports them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dcvideogen_jax import errors
from dcvideogen_jax.eval import (
  clip_figures,
  fvd,
  images,
  lpips,
  measurements,
  networks,
  reconstruction_runs,
)
from dcvideogen_jax.models import lpips as lpips_model
from tests import random_weights

# One, two and no windows of 16 frames.
LENGTHS = 16, 33, 9


class Small(nn.Module):
  """In place of I3D: five numbers of a clip, by its patches and its motion."""

  @nn.compact
  def __call__(self, video):
    patches = nn.avg_pool(video, (1, 56, 56), (1, 56, 56))
    motion = jnp.abs(jnp.diff(patches, axis=1)).mean(axis=1)
    x = jnp.concatenate([patches.mean(axis=1), motion], axis=-1)
    return nn.Dense(5)(jnp.tanh(x.reshape(len(x), -1)))


@pytest.fixture(scope="module")
def nets():
  """AlexNet's LPIPS and a network in place of I3D, with random weights."""
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  video = jax.ShapeDtypeStruct((1, 9, 224, 224, 3), np.float32)
  alex, small = lpips_model.LPIPS("alex"), Small()
  weights = random_weights.of(alex, image, image)
  # LPIPS's linear layers are positive.
  weights = jax.tree.map(abs, weights)
  return clip_figures.Networks(
    networks.Network("lpips_alex", alex, weights, "random"),
    networks.Network("i3d", small, random_weights.of(small, video), "random"),
  )


def videos(lengths=LENGTHS, side=32):
  random = np.random.default_rng(0)
  return [
    random.integers(0, 256, (t, side, side, 3), np.uint8) for t in lengths
  ]


def noisy(video):
  """Frame t is off by up to t + 1 levels; odd lengths are brighter."""
  off = np.arange(1, len(video) + 1)[:, None, None, None] * (video % 3)
  off += 40 * (len(video) % 2)
  return np.clip(video + off, 0, 255).astype(np.uint8)


class Counted:
  """Clips, and a count of how often each was read."""

  def __init__(self, arrays):
    self.arrays, self.read = arrays, []
    names = [f"clip {i}" for i in range(len(arrays))]
    self.clips = reconstruction_runs.Clips(names, self._get, {"set": "made"})

  def _get(self, i):
    self.read.append(i)
    return self.arrays[i]


@pytest.fixture(scope="module")
def measured(nets, tmp_path_factory):
  """Clips that two models were measured on, and the record."""
  counted = Counted(videos())
  path = tmp_path_factory.mktemp("record") / "x.clips.jsonl"
  record = measurements.Record(path, {})
  for label, model in (("noisy", noisy), ("exact", np.copy)):
    reconstruction_runs.measure(
      label, model, counted.clips, record, "float32", nets
    )
  return counted, path


def read(path):
  return measurements.Record(path, {})


def test_lpips_by_frame(nets, measured):
  counted, path = measured
  found = reconstruction_runs.summary("noisy", counted.clips, read(path))
  network = nets.lpips
  values = [
    lpips.distance(network.module, network.variables, x, noisy(x))
    for x in counted.arrays
  ]
  assert found["lpips"] == pytest.approx(np.concatenate(values).mean())
  assert found["lpips_by_clip"] == pytest.approx([x.mean() for x in values])
  assert found["lpips_std_over_clips"] == pytest.approx(
    np.std([x.mean() for x in values], ddof=1)
  )
  curve = found["lpips_by_frame"]
  assert len(curve) == 33 and curve[32] == pytest.approx(values[1][32])
  assert curve[12] == pytest.approx(np.mean([x[12] for x in values[:2]]))
  exact = reconstruction_runs.summary("exact", counted.clips, read(path))
  assert exact["lpips"] == 0 and exact["psnr"] is None


def test_fvd_of_whole_clips_and_of_windows(nets, measured):
  counted, path = measured
  found = reconstruction_runs.summary("noisy", counted.clips, read(path))

  def moments(arrays, length):
    """Windows of clips that have them; None is whole clips."""
    cut = [
      part
      for x in arrays
      if len(x) >= (length or 0)
      for part in fvd.windows(x, length)
    ]
    network = nets.i3d
    rows = [
      fvd.features(network.module, network.variables, [part]) for part in cut
    ]
    return fvd.Moments.of(np.concatenate(rows))

  others = [noisy(x) for x in counted.arrays]
  for key, length, n in (("fvd", None, 3), ("fvd_16", 16, 3)):
    expected = fvd.distance(
      moments(others, length), moments(counted.arrays, length)
    )
    scale = np.trace(moments(counted.arrays, length).covariance)
    assert expected > 0.01 * scale > 0
    assert found[key] == pytest.approx(expected, rel=1e-5)
    assert found[f"{key}_n"] == n
  exact = reconstruction_runs.summary("exact", counted.clips, read(path))
  assert exact["fvd"] == pytest.approx(0, abs=1e-9 * found["fvd"])
  # Without one clip each.
  values = []
  for i in range(3):
    arrays = [x for j, x in enumerate(counted.arrays) if j != i]
    sides = [noisy(x) for x in arrays], arrays
    values.append(fvd.distance(*(moments(side, None) for side in sides)))
  deviations = np.square(np.subtract(values, np.mean(values)))
  expected = np.sqrt(2 / 3 * deviations.sum())
  assert found["fvd_error"] == pytest.approx(expected, rel=1e-5)
  # Without clip 1 there is one window.
  assert found["fvd_16_error"] is None


def test_more_clips_than_groups_of_a_jackknife():
  """Of a known spread: means of 200 features of deviation 3, one wide."""
  rng = np.random.default_rng(0)
  values = 50 + 3 * rng.normal(size=(200, 1))
  pairs = [
    (x[None], np.array([[(-1.0) ** (i // 20)]])) for i, x in enumerate(values)
  ]
  # The derivative of FVD by the mean is 2 * 50.
  assert clip_figures.standard_error(pairs) == pytest.approx(
    2 * 50 * 3 / np.sqrt(200), rel=0.3
  )


def test_pieces_give_the_figures_of_whole_clips(nets, measured, tmp_path):
  """But for FVD of whole clips. Pieces end elsewhere than windows."""
  counted, path = measured
  clips = counted.clips._replace(
    pieces=lambda i: np.split(counted.arrays[i], [5, 6])
  )
  cuts = [7, 8]
  whole = [noisy(x) for x in counted.arrays]

  def reconstruct(pieces):
    clip = np.concatenate([*pieces])
    (other,) = (y for y in whole if len(y) == len(clip))
    yield from zip(np.split(clip, cuts), np.split(other, cuts), strict=True)

  record = measurements.Record(tmp_path / "x.jsonl", {})
  reconstruction_runs.measure_in_pieces(
    "noisy", reconstruct, clips, record, "float32", nets
  )
  found = reconstruction_runs.summary("noisy", clips, record)
  expected = reconstruction_runs.summary("noisy", counted.clips, read(path))
  assert found.keys() == expected.keys() - {"fvd", "fvd_n", "fvd_error"}
  assert found.pop("fvd_16_error") is expected["fvd_16_error"] is None
  for key, value in found.items():
    assert value == pytest.approx(expected[key], rel=1e-5), key
  table = reconstruction_runs.markdown({"set": "made"}, {"noisy": found})
  assert "FVD, windows of 16" in table and "whole clips" not in table


def test_a_stopped_run_measures_what_is_left(nets, measured, tmp_path):
  """Killed between the original of clip 1 and its reconstruction."""
  counted, path = measured
  lines = path.read_text().splitlines(keepends=True)
  assert '"model": null' in lines[3] and '"clip": "clip 1"' in lines[3]
  stopped = tmp_path / "stopped.jsonl"
  stopped.write_text("".join(lines[:4]) + lines[4][:50])
  again = Counted(counted.arrays)
  record = read(stopped)
  reconstruction_runs.measure(
    "noisy", noisy, again.clips, record, "float32", nets
  )
  assert again.read == [1, 2]
  # Nothing was measured twice, originals included.
  assert stopped.read_text() == "".join(lines[:7])
  assert reconstruction_runs.summary(
    "noisy", again.clips, read(stopped)
  ) == reconstruction_runs.summary("noisy", counted.clips, read(path))


def test_the_table_says_what_was_measured(measured):
  counted, path = measured
  record = read(path)
  models = {
    label: reconstruction_runs.summary(label, counted.clips, record)
    for label in ("noisy", "exact")
  }
  about = {
    "set": "made",
    **reconstruction_runs.sizes([x.shape for x in counted.arrays]),
    "LPIPS": "AlexNet of random",
  }
  lines = reconstruction_runs.markdown(about, models).splitlines()
  assert lines[0] == (
    "set made, clips 3, frames 9 to 33, size 32 x 32, LPIPS AlexNet of random."
  )
  head, found = ([x.strip() for x in lines[i].split("|")] for i in (2, 4))
  row = dict(zip(head, found, strict=True))
  assert row["LPIPS"] == f"{models['noisy']['lpips']:.4f}"
  assert row["FVD, whole clips"] == f"{models['noisy']['fvd']:.2f}"
  assert row["FVD, windows of 16"] == f"{models['noisy']['fvd_16']:.2f}"
  assert lines[3].count("|") == lines[2].count("|") and "MS-SSIM" not in row
  assert "FVD of whole clips: N = 3; compare at the same N only." in lines
  assert "FVD of windows of 16 frames: N = 3" in lines[-1]


def test_fvd_of_one_clip_has_no_meaning(measured):
  counted, path = measured
  one = counted.clips._replace(names=["clip 2"])
  found = reconstruction_runs.summary("noisy", one, read(path))
  assert (found["fvd"], found["fvd_n"]) == (None, 1)
  assert (found["fvd_16"], found["fvd_16_n"]) == (None, 0)
  table = reconstruction_runs.markdown({"set": "made"}, {"noisy": found})
  assert (
    "FVD of whole clips has no meaning with N = 1: it needs at least two clips."
    in table
  )
  assert "with N = 0: it needs at least two windows." in table


@pytest.mark.parametrize("small", [False, True])
def test_ms_ssim_where_all_sides_allow(tmp_path, small):
  arrays = videos((1, 2), side=176)
  if small:
    arrays += videos((1,))
  clips = Counted(arrays).clips
  record = measurements.Record(tmp_path / "x", {})
  reconstruction_runs.measure("noisy", noisy, clips, record, "float32")
  found = reconstruction_runs.summary("noisy", clips, record)
  assert "fvd" not in found and "lpips" not in found
  table = reconstruction_runs.markdown({"set": "made"}, {"noisy": found})
  assert (
    ("| MS-SSIM |" in table) == ("ms_ssim_by_frame" in found) == (not small)
  )
  if not small:
    expected = [images.ms_ssim(x, noisy(x)) for x in arrays]
    assert found["ms_ssim"] == pytest.approx(np.concatenate(expected).mean())


def test_a_clip_too_short_is_told_before_it_is_reconstructed(nets, tmp_path):
  def reconstruct(video):
    raise AssertionError

  clips = Counted(videos((8,))).clips
  record = measurements.Record(tmp_path / "x", {})
  with pytest.raises(errors.UserError, match="at least 9 frames .* found 8"):
    reconstruction_runs.measure(
      "noisy", reconstruct, clips, record, "float32", nets
    )
