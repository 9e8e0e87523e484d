"""Reading images, and what happens to bad ones."""

import numpy as np
import PIL.Image
import pytest
import recordings

from dcvideogen_jax import errors
from dcvideogen_jax.data import stills, video


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".tiff"])
def test_images_come_back(tmp_path, suffix):
  picture = recordings.clip(1)[0]
  path = tmp_path / f"a{suffix}"
  PIL.Image.fromarray(picture).save(path, lossless=True)
  assert video.is_image(path)
  np.testing.assert_array_equal(stills.read(path), picture)


def test_grey_palette_and_16_bit_images(tmp_path):
  grey = recordings.clip(1)[0, ..., 0]
  expected = np.repeat(grey[..., None], 3, -1)
  PIL.Image.fromarray(grey).save(tmp_path / "8.png")
  PIL.Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
  PIL.Image.fromarray(grey).convert("P").save(tmp_path / "p.png")
  for name in ("8", "16", "p"):
    np.testing.assert_array_equal(
      stills.read(tmp_path / f"{name}.png"), expected
    )


def test_transparent_parts_are_white(tmp_path):
  picture = np.dstack([recordings.clip(1)[0], np.full((48, 64), 255, np.uint8)])
  picture[:10, :, 3] = 0
  PIL.Image.fromarray(picture).save(tmp_path / "a.png")
  back = stills.read(tmp_path / "a.png")
  assert (back[:10] == 255).all()
  np.testing.assert_array_equal(back[10:], picture[10:, :, :3])


def test_photographs_are_upright(tmp_path):
  picture = recordings.clip(1)[0]
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
  PIL.Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
  np.testing.assert_array_equal(
    stills.read(tmp_path / "a.png"), np.rot90(picture, -1)
  )


def _corrupt_png(path):
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
  PIL.Image.fromarray(noise).save(path)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


def _cut_png(path):
  _corrupt_png(path)
  path.write_bytes(path.read_bytes()[:4000])


@pytest.mark.parametrize(
  "make",
  [
    _corrupt_png,
    _cut_png,
    lambda p: p.write_text("no picture"),
    lambda p: p.write_bytes(b""),
    lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"),
    lambda p: p.mkdir(),
    lambda p: None,
  ],
  ids=["corrupt", "cut", "text", "empty", "header", "folder", "missing"],
)
def test_bad_images_are_told_in_a_sentence(tmp_path, make):
  path = tmp_path / "a.png"
  make(path)
  with pytest.raises(errors.UserError) as e:
    stills.read(path)
  assert str(path) in str(e.value) and "\n" not in str(e.value)
