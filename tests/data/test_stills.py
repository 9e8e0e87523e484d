"""Photographs and animations are known by their content and read as sRGB."""

import struct
import sys
import warnings

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import recordings

from dcvideogen_jax import errors
from dcvideogen_jax.data import stills, video
from dcvideogen_jax.sample import request_list

COLOURS = np.array(
  [(200, 40, 40), (40, 160, 60), (50, 60, 190), (230, 200, 90)]
)


def _quarters(height=48, width=64):
  rows = np.arange(height) * 2 // height
  columns = np.arange(width) * 2 // width
  return COLOURS[2 * rows[:, None] + columns].astype(np.uint8)


def _error(picture):
  """Returns the largest difference in the middles of the quarters."""
  height, width, _ = picture.shape
  rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
  found = picture[np.ix_(rows, columns)].reshape(4, 3).astype(int)
  return np.abs(found - COLOURS).max()


def _profile(
  primaries=(
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
  ),
):
  """Builds an ICC profile, of Display P3 unless other primaries are given.

  ICC.1:2010, with D50 as white and sRGB's curve.
  """

  def fixed(*values):
    return b"".join(struct.pack(">i", round(x * 65536)) for x in values)

  def xyz(*values):
    return b"XYZ " + bytes(4) + fixed(*values)

  parameters = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
  curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(*parameters)
  text = "P3".encode("utf-16-be")
  name = b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", 4, 28)
  tags = {b"desc": name + text, b"cprt": name + text}
  tags[b"wtpt"] = xyz(0.9642, 1.0, 0.8249)
  for letter, values in zip(b"rgb", primaries, strict=True):
    tags[bytes([letter]) + b"XYZ"] = xyz(*values)
    tags[bytes([letter]) + b"TRC"] = curve
  table, data, offset = b"", b"", 132 + 12 * len(tags)
  for tag, content in tags.items():
    content += bytes(-len(content) % 4)
    table += tag + struct.pack(">II", offset + len(data), len(content))
    data += content
  body = struct.pack(">I", len(tags)) + table + data
  header = struct.pack(
    ">I4sI4s4s4s12s4s28x",
    128 + len(body),
    b"lcms",
    0x04000000,
    b"mntr",
    b"RGB ",
    b"XYZ ",
    bytes(12),
    b"acsp",
  )
  header += fixed(0.9642, 1.0, 0.8249)
  return header + bytes(128 - len(header)) + body


def _in_display_p3(rgb):
  """Converts sRGB levels to Display P3."""
  matrix = np.array(
    [
      [0.8225, 0.1774, 0.0000],
      [0.0332, 0.9669, 0.0000],
      [0.0171, 0.0724, 0.9108],
    ]
  )
  x = rgb / 255
  x = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
  x = x @ matrix.T
  x = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
  return (255 * x).round().astype(np.uint8)


def _save(path, picture, mode=None, **options):
  image = PIL.Image.fromarray(picture)
  image = image.convert(mode) if mode else image
  image.save(path, **options)
  return path


@pytest.mark.parametrize(
  ("name", "form", "options"),
  [
    ("a.png", "PNG", {}),
    ("a.jfif", "JPEG", {"quality": 98}),
    ("a.jpg", "AVIF", {"quality": 98}),  # as messengers name it
    ("a.avif", "AVIF", {"quality": 98}),
    ("a.PNG", "WEBP", {"lossless": True}),
    ("a.mp4", "PNG", {}),
    ("a", "BMP", {}),
    ("a.mpo", "MPO", {"save_all": True, "quality": 98}),
    ("a.gif", "GIF", {}),
    ("a.jp2", "JPEG2000", {}),
  ],
)
def test_images_are_known_by_their_content(tmp_path, name, form, options):
  path = tmp_path / name
  if form == "MPO":
    options = {**options, "append_images": [PIL.Image.new("RGB", (64, 48))]}
  _save(path, _quarters(), format=form, **options)
  assert video.is_image(path)
  for picture in (
    stills.read(path),
    request_list.read_image(str(path)),
    recordings.read(path)[0],
  ):
    assert picture.shape == (48, 64, 3) and _error(picture) <= 2
  info = video.probe(path)
  assert (info.height, info.width, info.frames) == (48, 64, 1)


def test_videos_and_texts_are_no_images(tmp_path):
  recordings.write(tmp_path / "a.mp4", recordings.clip(3))
  path = tmp_path / "a.png"
  path.write_bytes((tmp_path / "a.mp4").read_bytes())
  (tmp_path / "b.png").write_text("no picture")
  for name in ("a.png", "b.png", "missing.png"):
    assert not video.is_image(tmp_path / name)
  assert len(recordings.read(path)) == 3
  with pytest.raises(errors.UserError, match="a.png is not an image"):
    request_list.read_image(str(path))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_display_p3_becomes_srgb(tmp_path, mode):
  picture = _in_display_p3(_quarters())
  assert _error(picture) > 15
  path = _save(tmp_path / "a.png", picture, mode, icc_profile=_profile())
  assert _error(stills.read(path)) <= 1


def test_a_profile_of_srgb_changes_nothing(tmp_path):
  profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB"))
  picture = recordings.clip(1)[0]
  path = _save(tmp_path / "a.png", picture, icc_profile=profile.tobytes())
  assert np.abs(stills.read(path).astype(int) - picture).max() <= 1


def test_a_profile_that_cannot_be_used_is_said(tmp_path):
  path = _save(tmp_path / "a.png", _quarters(), icc_profile=b"no profile" * 20)
  with pytest.warns(
    UserWarning, match="a.png has a colour profile that cannot"
  ):
    assert _error(stills.read(path)) == 0


def test_cmyk_and_grey_with_transparency(tmp_path):
  path = _save(tmp_path / "a.tiff", _quarters(), "CMYK")
  assert _error(stills.read(path)) <= 1
  grey = np.array([[0, 60], [120, 240]], np.uint8).repeat(8, 0).repeat(8, 1)
  alpha = np.full_like(grey, 255)
  alpha[8:, 8:] = 0
  PIL.Image.merge("LA", [PIL.Image.fromarray(x) for x in (grey, alpha)]).save(
    tmp_path / "b.png"
  )
  found = stills.read(tmp_path / "b.png")
  assert found.shape == (16, 16, 3)
  assert found[::8, ::8, 0].tolist() == [[0, 60], [120, 255]]


def test_16_bits(tmp_path):
  rng = np.random.default_rng(0)
  grey = rng.integers(0, 65536, (8, 9), np.uint16)
  for name in ("a.png", "a.tiff"):
    PIL.Image.fromarray(grey).save(tmp_path / name)
    found = stills.read(tmp_path / name)
    assert np.abs(found[..., 0] - grey / 257).max() <= 0.5


def test_floating_point_is_refused_by_name(tmp_path):
  PIL.Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
  with pytest.raises(
    errors.UserError, match="^[^ ]*a.tiff holds floating-point"
  ):
    stills.read(tmp_path / "a.tiff")


@pytest.mark.parametrize("form", ["WEBP", "GIF", "AVIF", "PNG"])
def test_animations_are_videos(tmp_path, form):
  pictures = [_quarters()[::step] for step in (1, -1, 1)]
  path = tmp_path / "a.bin"
  first, *others = [PIL.Image.fromarray(x) for x in pictures]
  options = {"AVIF": {"quality": 98}, "WEBP": {"lossless": True}}.get(form, {})
  first.save(
    path, form, save_all=True, append_images=others, duration=250, **options
  )
  assert not video.is_image(path)
  info = video.probe(path)
  assert (info.height, info.width, info.frames) == (48, 64, 3)
  assert (info.fps, info.seconds) == (pytest.approx(4), pytest.approx(0.75))
  found = list(video.frames(path))
  assert [f.seconds for f in found] == pytest.approx([0, 0.25, 0.5])
  for frame, step in zip(found, (1, -1, 1), strict=True):
    assert _error(frame.rgb()[::step]) <= 3
  assert len(recordings.read(path, start=0.25, size=(24, 32))) == 2
  with pytest.raises(errors.UserError, match="from second 3 on"):
    recordings.read(path, start=3)
  with pytest.warns(UserWarning, match="animation of 3 .* first is taken"):
    assert _error(request_list.read_image(str(path))) <= 3


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_is_named(tmp_path, monkeypatch, brand):
  monkeypatch.setitem(sys.modules, "pillow_heif", None)
  path = tmp_path / "a.jpg"
  path.write_bytes(struct.pack(">I4s4sI4s", 20, b"ftyp", brand, 0, b"heic"))
  assert video.is_image(path)
  for function in (stills.read, video.probe, recordings.read):
    with pytest.raises(errors.UserError, match="HEIC.* pillow-heif"):
      function(path)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF", "JPEG", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_cut_images_are_told(tmp_path, form, kept):
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (3, 48, 64, 3), np.uint8)
  first, *others = [PIL.Image.fromarray(x) for x in noise]
  options = {"save_all": True, "append_images": others}
  if form in ("JPEG", "TIFF"):
    options = {}
  path = tmp_path / "a.bin"
  first.save(path, form, **options)
  content = path.read_bytes()
  path.write_bytes(content[: int(kept * len(content))])
  with pytest.raises(errors.UserError, match="damaged|truncated") as e:
    recordings.read(path)
  assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_reading_says_nothing_without_need(tmp_path):
  path = _save(tmp_path / "a.jpg", _quarters(), quality=95)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = stills.read(path)
    recordings.read(path)
  assert found.shape == _quarters().shape
