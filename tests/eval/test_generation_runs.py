"""Figures of generated videos, as a run records and reports them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import linen as nn

from dcvideogen_jax import errors
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.eval import (
  clip_figures,
  fvd,
  generation_runs,
  image_to_video,
  images,
  measurements,
  networks,
)
from tests import random_weights


class Small(nn.Module):
  """In place of I3D: three numbers of a clip."""

  @nn.compact
  def __call__(self, video):
    x = nn.avg_pool(video, (1, 56, 56), (1, 56, 56))
    return nn.Dense(3)(jnp.tanh(x.mean(axis=1)).reshape(len(x), -1))


@pytest.fixture(scope="module")
def nets():
  video = jax.ShapeDtypeStruct((1, 9, 224, 224, 3), np.float32)
  small = Small()
  weights = random_weights.of(small, video)
  return clip_figures.Networks(
    None, networks.Network("i3d", small, weights, "random")
  )


def clip(seed, frames=18):
  random = np.random.default_rng(seed)
  small = random.integers(0, 256, (frames, 4, 5, 3), np.uint8)
  return small.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two videos in the layout of `sample --vbench`, one in that of `sample`."""
  root = tmp_path_factory.mktemp("made")
  PIL.Image.fromarray(clip(7, 1)[0]).save(root / "first.png")
  for i, place in enumerate(("videos/a", "videos/b", "c")):
    path = root / f"{place}.mp4"
    path.parent.mkdir(exist_ok=True)
    with video_files.VideoWriter(path, fps=16, crf=10) as writer:
      writer.write(clip(i))
    image = None if i == 1 else str(root / "first.png")
    settings = {"prompts": [f"prompt {i}"], "image": image}
    beside = root / place.replace("videos", "settings")
    beside.parent.mkdir(exist_ok=True)
    beside.with_suffix(".json").write_text(json.dumps({"settings": settings}))
  return root


def frames_of(video):
  return np.stack([*video_files.read_frames(video.path)])


def picture(path, height, width):
  image = np.asarray(PIL.Image.open(path))
  assert image.shape == (height, width, 3)
  return image


def facts(video, frames):
  assert len(frames) == 18
  return {"right": {"colour": video.prompt != "prompt 2", "all": False}}


def test_settings_beside_videos(folder, tmp_path):
  image = str(folder / "first.png")
  videos = generation_runs.listed(folder)
  assert [(x.path.name, x.prompt, x.image) for x in videos] == [
    ("c.mp4", "prompt 2", image),
    ("a.mp4", "prompt 0", image),
    ("b.mp4", "prompt 1", None),
  ]
  for name in ("first.png", "b.jpg"):
    (tmp_path / name).touch()
  found = generation_runs.listed(folder, tmp_path)
  assert [x.image for x in found] == [
    str(tmp_path / name) for name in ("first.png", "first.png", "b.jpg")
  ]
  with pytest.raises(errors.UserError, match="has no image first.png of"):
    generation_runs.listed(folder, folder / "videos")
  with pytest.raises(errors.UserError, match="has no videos"):
    generation_runs.listed(tmp_path)
  settings = {"settings": {"image": "/gone.png"}}
  (tmp_path / "x.mp4").touch()
  (tmp_path / "x.json").write_text(json.dumps(settings))
  with pytest.raises(errors.UserError, match="/gone.png that .*x.mp4 starts"):
    generation_runs.listed(tmp_path)
  (tmp_path / "x.json").write_text("{")
  with pytest.raises(errors.UserError, match="cannot read .*x.json"):
    generation_runs.listed(tmp_path)


@pytest.mark.parametrize("window", [None, 9])
def test_figures_of_a_stopped_run(folder, nets, tmp_path, window):
  videos = generation_runs.listed(folder)
  reference = generation_runs.Reference(["x", "y"], lambda i: clip(20 + i))
  path = tmp_path / "x.clips.jsonl"

  def run():
    record = measurements.Record(path, {})
    generation_runs.measure_reference(reference, record, nets.i3d, window)
    generation_runs.measure(videos, record, nets, window, picture, facts)
    return record

  run()
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:4]) + lines[4][:40])
  assert not generation_runs.has_all(
    videos, reference, measurements.Record(path, {})
  )
  record = run()
  assert path.read_text() == "".join(lines)
  assert generation_runs.has_all(videos, reference, record)

  def features(clips):
    module, variables = nets.i3d.module, nets.i3d.variables
    parts = [x for y in clips for x in fvd.windows(y, window)]
    return fvd.Moments.of(fvd.features(module, variables, parts))

  made = [frames_of(x) for x in videos]
  real = features([clip(20), clip(21)])
  stored = generation_runs.moments(reference.names, videos, record)
  np.testing.assert_allclose(stored.mean, real.mean, rtol=1e-6)
  assert stored.count == (2 if window is None else 4)
  found = generation_runs.summary(videos, record, stored)
  assert found["fvd"] == pytest.approx(
    fvd.distance(features(made), real), rel=1e-5
  )
  assert found["fvd_n"] == (3 if window is None else 6)
  assert found["fvd_reference_n"] == stored.count
  image = picture(folder / "first.png", 32, 40)
  psnr = [images.psnr(image[None], x[:1])[0] for x in made[:2]]
  first = found["first_frame"]["psnr"]
  assert first["mean"] == pytest.approx(np.mean(psnr)) and first["n"] == 2
  assert first["std"] == pytest.approx(np.std(psnr, ddof=1))
  starts = (image, image, None)
  drift = [
    image_to_video.drift(x, y) for x, y in zip(made, starts, strict=True)
  ]
  assert drift[2][0] == 0 < drift[0][0]
  np.testing.assert_allclose(
    found["drift"]["by_frame"], np.mean(drift, axis=0), rtol=1e-6
  )
  last = [x[-1] for x in drift]
  assert found["drift"]["last"]["mean"] == pytest.approx(np.mean(last))
  largest = [max(x) for x in drift]
  assert found["drift"]["largest"]["mean"] == pytest.approx(np.mean(largest))
  assert found["facts"] == {"colour": pytest.approx(2 / 3), "all": 0}
  assert found["by_video"][0]["prompt"] == "prompt 2"
  table = generation_runs.markdown({"set": "made"}, found)
  n = f"{found['fvd_n']} against {stored.count}"
  assert f"| FVD | {found['fvd']:.2f} | - | {n} |" in table
  assert f"| first frame, PSNR, dB | {first['mean']:.4f} |" in table
  assert "| colour right | 0.6667 | - | 3 |" in table
  assert "| all three right | 0.0000 |" in table


def test_lpips_and_an_exact_first_frame(folder, tmp_path, monkeypatch):
  (video, *_) = generation_runs.listed(folder)
  frames = frames_of(video)

  def distance(module, variables, x, y):
    np.testing.assert_array_equal(x[0], frames[0])
    assert (module, variables, len(y)) == ("m", "v", 1)
    return np.array([0.25])

  monkeypatch.setattr(generation_runs.lpips, "distance", distance)
  net = networks.Network("lpips_alex", "m", "v", "random")
  record = measurements.Record(tmp_path / "x", {})
  generation_runs.measure(
    [video],
    record,
    clip_figures.Networks(net),
    None,
    lambda path, height, width: frames[0],
  )
  found = generation_runs.summary([video], record)
  assert found["first_frame"]["lpips"]["mean"] == 0.25
  assert found["first_frame"]["psnr"] == {
    "mean": None,
    "std": None,
    "n": 0,
    "exact": 1,
  }
  table = generation_runs.markdown({"set": "made"}, found)
  assert "| first frame, PSNR, dB | - | - | 0, 1 exact |" in table
  assert "FVD" not in table and "right" not in table
