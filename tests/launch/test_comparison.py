"""The contact sheet and the metrics of frames that are known."""

import json

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax.data import video
from dcvideogen_jax.eval import comparison as comparison_lib
from dcvideogen_jax.eval import contact_sheet
from tests.launch import launching

# What x264 loses of frames this small is not the same in every run: of one
# video it wrote 12 bytes more, in about one run of a hundred.
LOSSLESS = 0


def compare(directory, originals, reconstructions, step, fps=10.0):
  comparison = comparison_lib.Comparison(
    directory, "title", frames=len(originals), fps=fps, crf=LOSSLESS
  )
  with comparison:
    for i in range(0, len(originals), step):
      comparison.add(originals[i : i + step], reconstructions[i : i + step])
  return comparison.metrics()


def test_exact_frames_have_no_psnr(tmp_path):
  x = launching.clip(3, 8, 12)
  y = x.copy()
  y[1] ^= 1
  metrics = compare(tmp_path, x, y, 2)
  # A difference of 1 everywhere.
  one = 20 * np.log10(255)
  assert metrics["psnr"]["mean"] == pytest.approx(one)
  assert metrics["psnr"]["per_frame"] == [
    None,
    pytest.approx(one, abs=1e-4),
    None,
  ]
  assert metrics["psnr"]["exact_frames"] == 2
  assert metrics["ssim"]["per_frame"][::2] == pytest.approx([1, 1], abs=1e-5)
  json.dumps(metrics, allow_nan=False)


def test_all_frames_exact(tmp_path):
  x = launching.clip(2, 8, 12)
  metrics = compare(tmp_path, x, x, 1)
  assert metrics["psnr"]["mean"] is None
  assert metrics["ssim"]["mean"] == pytest.approx(1)


def test_frames_do_not_depend_on_how_they_come(tmp_path):
  x, y = launching.clip(7, 8, 12), launching.clip(7, 8, 12, seed=1)
  found = []
  for step in (1, 3, 7):
    directory = tmp_path / str(step)
    directory.mkdir()
    metrics = compare(directory, x, y, step)
    found.append((metrics, {p.name: shown(p) for p in directory.iterdir()}))
  for metrics, files in found[1:]:
    assert files.keys() == found[0][1].keys()
    for name, pixels in files.items():
      np.testing.assert_array_equal(pixels, found[0][1][name], name)
    # Sums over other numbers of frames may round the last bit otherwise.
    for name in ("psnr", "ssim"):
      assert metrics[name]["per_frame"] == pytest.approx(
        found[0][0][name]["per_frame"], rel=1e-5
      )


def shown(path):
  """The pixels of a picture or a video."""
  if path.suffix == ".png":
    return np.asarray(PIL.Image.open(path))
  return np.stack(list(video.read_frames(path)))


def test_nothing_is_left_after_an_error(tmp_path):
  x = launching.clip(2, 8, 12)
  with pytest.raises(ZeroDivisionError):
    with comparison_lib.Comparison(
      tmp_path, "title", frames=2, fps=10.0
    ) as comparison:
      comparison.add(x, x)
      raise ZeroDivisionError
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("frames", "shown"),
  [(1, [0]), (3, [0, 1, 2]), (50, [0, 7, 14, 21, 28, 35, 42, 49])],
)
def test_sheet_shows_evenly_spaced_frames(monkeypatch, tmp_path, frames, shown):
  titles = []
  monkeypatch.setattr(
    contact_sheet,
    "write",
    lambda *args: titles.extend(c.title for c in args[2]),
  )
  x = launching.clip(frames, 6, 6)
  compare(tmp_path, x, 255 - x, 4)
  assert [int(t.split()[1].rstrip(":")) for t in titles] == shown


@pytest.mark.parametrize(("size", "scale"), [((60, 90), 4), ((720, 500), 0.5)])
def test_sheet_pixels(tmp_path, size, scale):
  original = np.full((*size, 3), 200, np.uint8)
  reconstruction = np.full(
    (*size, 3), 200 - contact_sheet.ERROR_RANGE // 3, np.uint8
  )
  original[..., 2] = reconstruction[..., 2] = 9
  column = contact_sheet.comparison("frame 0", original, reconstruction)
  assert column.images[0].shape == (*(round(n * scale) for n in size), 3)
  path = tmp_path / "sheet.png"
  contact_sheet.write(path, "title", [column, column])
  sheet = np.asarray(PIL.Image.open(path)).reshape(-1, 3)
  area = round(size[0] * scale) * round(size[1] * scale)
  # Two of three channels differ by a third of the range: 2/9 is dark red.
  for colour in ((200, 200, 9), (184, 184, 9), (170, 0, 0)):
    assert np.sum(np.all(sheet == colour, axis=-1)) >= 2 * area
