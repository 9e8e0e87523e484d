"""Shape, orientation and colours of frames are those on the screen."""

import fractions
import warnings

import av
import numpy as np
import pytest
import recordings

from dcvideogen_jax import errors
from dcvideogen_jax.data import buckets, pixels, video


def _write(path, frames, *, codec="libx264", setup=None, **options):
  """Writes a video of the given frames; `setup` may change the stream."""
  height, width = frames[0].height, frames[0].width
  with av.open(str(path), "w", **options) as container:
    stream = container.add_stream(codec, rate=16)
    stream.height, stream.width = height, width
    stream.pix_fmt = frames[0].format.name
    if codec == "libx264":
      stream.options = {"crf": "2"}
    if setup is not None:
      setup(stream)
    for i, frame in enumerate(frames):
      frame.pts, frame.time_base = i, fractions.Fraction(1, 16)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def _planes(values, form="yuv420p10le", height=16, width=64):
  """Makes a frame of vertical strips with these (Y, Cb, Cr)."""
  frame = av.VideoFrame(width, height, form)
  dtype = np.uint16 if "10" in form else np.uint8
  for i, plane in enumerate(frame.planes):
    content = np.zeros((plane.height, plane.line_size), np.uint8).view(dtype)
    strip = plane.width // len(values)
    for j, value in enumerate(values):
      content[:, j * strip : (j + 1) * strip] = value[i]
    plane.update(content.tobytes())
  return frame


def _strips(path, count):
  """Returns the colour in the middle of each strip."""
  (frame,) = video.read_frames(path, max_frames=1)
  height, width, _ = frame.shape
  middle = (np.arange(count) * 2 + 1) * width // (2 * count)
  return frame[height // 2, middle].astype(int)


# --- shape -------------------------------------------------------------------


def _disc(height, width, shown):
  """Draws a disc that is round if `width` columns are shown as `shown`."""
  y, x = np.mgrid[:height, :width]
  x = (x + 0.5) * shown / width
  inside = (x - shown / 2) ** 2 + (y - height / 2) ** 2 < (height / 3) ** 2
  array = np.where(inside[..., None], [230, 40, 40], [20, 30, 60])
  return av.VideoFrame.from_ndarray(array.astype(np.uint8)).reformat(
    format="yuv420p"
  )


@pytest.mark.parametrize(
  ("size", "aspect", "shown", "bucket"),
  [
    ((90, 120), "4/3", (90, 160), (480, 832)),  # HDV
    ((96, 120), "64/45", (96, 171), (480, 832)),  # PAL, wide
    ((128, 64), "2", (128, 128), (640, 640)),
    ((64, 128), "1/2", (64, 64), (640, 640)),
  ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_pixels_that_are_not_square(
  tmp_path, size, aspect, shown, bucket, turned
):
  def setup(stream):
    stream.codec_context.sample_aspect_ratio = fractions.Fraction(aspect)
    if turned:
      stream.set_display_rotation(90)

  path = _write(tmp_path / "a.mp4", [_disc(*size, shown[1])] * 2, setup=setup)
  frames = recordings.read(path)
  if turned:
    shown, bucket = shown[::-1], bucket[::-1]
  info = video.probe(path)
  assert (info.height, info.width) == frames.shape[1:3] == shown
  red = frames[0, ..., 0] > 128
  rows, columns = (np.ptp(np.where(red.any(i))) + 1 for i in (1, 0))
  assert columns / rows == pytest.approx(1, abs=0.05)
  sizes = buckets.find("480", 32)
  assert buckets.nearest(info.height, info.width, sizes) == bucket


def test_pixels_of_an_absurd_shape_are_refused(tmp_path):
  def setup(stream):
    stream.codec_context.sample_aspect_ratio = fractions.Fraction(12)

  path = _write(tmp_path / "a.mp4", [_disc(32, 32, 32)], setup=setup)
  for function in (video.probe, recordings.read):
    with pytest.raises(errors.UserError, match="12 times as wide as high"):
      function(path)


# Red, green, blue and white corners, from left to right and down, as ffmpeg
# 9.0.2 shows them.
SHOWN = {
  (0, ""): "RGBW",
  (0, "h"): "GRWB",
  (0, "v"): "BWRG",
  (90, ""): "GWRB",
  (90, "h"): "WGBR",
  (90, "v"): "RBGW",
  (180, ""): "WBGR",
  (180, "h"): "BWRG",
  (180, "v"): "GRWB",
  (270, ""): "BRWG",
  (270, "h"): "RBGW",
  (270, "v"): "WGBR",
}


def _corners():
  array = np.zeros((48, 64, 3), np.uint8)
  array[:24, :32], array[:24, 32:] = (200, 30, 30), (30, 180, 30)
  array[24:, :32], array[24:, 32:] = (30, 30, 200), (200, 200, 200)
  frame = av.VideoFrame.from_ndarray(array)
  return frame.reformat(format="yuv420p")


@pytest.mark.parametrize(("turn", "mirror"), SHOWN)
def test_display_matrices(tmp_path, turn, mirror):
  def setup(stream):
    stream.set_display_rotation(turn, hflip=mirror == "h", vflip=mirror == "v")

  path = _write(tmp_path / "a.mp4", [_corners()], setup=setup)
  (frame,) = video.read_frames(path)
  assert frame.shape == ((64, 48, 3) if turn % 180 else (48, 64, 3))
  colours = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
  found = [colours[tuple(frame[y, x] // 128)] for y in (8, -8) for x in (8, -8)]
  assert "".join(found) == SHOWN[turn, mirror]
  info = video.probe(path)
  assert (info.height, info.width) == frame.shape[:2]


def test_an_odd_angle_keeps_the_size_and_is_said(tmp_path):
  path = _write(
    tmp_path / "a.mp4",
    [_corners()],
    setup=lambda stream: stream.set_display_rotation(45),
  )
  with pytest.warns(UserWarning, match="a.mp4 is turned by 45 degrees"):
    (frame,) = video.read_frames(path)
  info = video.probe(path)
  assert frame.shape[:2] == (info.height, info.width) == (48, 64)
  # Counterclockwise: what was on the right is on top.
  assert frame[8, 32].argmax() == 1 and frame[8, 32].max() > 128
  assert frame[40, 32].argmax() == 2 and not frame[0, 0].any()


# --- colours -----------------------------------------------------------------

# White at 203 cd/m2, a grey card, red and green cloth, as FFmpeg's zscale
# converts them: 10-bit Y, Cb, Cr of BT.2020 with limited range.
HDR = {
  18: [(721, 512, 512), (446, 512, 512), (373, 442, 653), (470, 417, 448)],
  16: [(573, 512, 512), (424, 512, 512), (376, 466, 589), (433, 457, 480)],
}
SDR = [(255, 255, 255), (118, 118, 118), (203, 39, 39), (39, 149, 48)]


@pytest.mark.parametrize("primaries", [9, 2])
@pytest.mark.parametrize("transfer", HDR)
def test_hdr_becomes_what_other_screens_show(tmp_path, transfer, primaries):
  def setup(stream):
    context = stream.codec_context
    context.colorspace, context.color_range = 9, 1
    context.color_primaries, context.color_trc = primaries, transfer

  path = _write(
    tmp_path / "a.mkv", [_planes(HDR[transfer])], codec="ffv1", setup=setup
  )
  assert np.abs(_strips(path, 4) - SDR).max() <= 2
  assert recordings.read(path, size=(8, 32)).shape == (1, 8, 32, 3)


def test_bt2020_without_hdr(tmp_path):
  """Colours of BT.709 that are stored in BT.2020's primaries come back."""

  def setup(stream):
    context = stream.codec_context
    context.colorspace, context.color_range = 9, 1
    context.color_primaries, context.color_trc = 9, 14

  # ITU-R BT.2087: linear BT.709 to BT.2020.
  matrix = [
    [0.6274, 0.3293, 0.0433],
    [0.0691, 0.9195, 0.0114],
    [0.0164, 0.0880, 0.8956],
  ]
  wanted = np.array([(255, 255, 255), (200, 30, 40), (20, 180, 60), (9, 9, 99)])
  rgb = ((wanted / 255) ** 2.4 @ np.transpose(matrix)) ** (1 / 2.4)
  y = rgb @ [0.2627, 0.6780, 0.0593]
  planes = np.stack(
    [
      64 + 876 * y,
      512 + 896 * (rgb[:, 2] - y) / 1.8814,
      512 + 896 * (rgb[:, 0] - y) / 1.4746,
    ],
    -1,
  )
  path = _write(
    tmp_path / "a.mkv", [_planes(planes.round())], codec="ffv1", setup=setup
  )
  assert np.abs(_strips(path, 4) - wanted).max() <= 2


@pytest.mark.parametrize(
  ("height", "width", "red"),
  [
    (720, 16, (81, 90, 240)),  # BT.601's red, which BT.709 shows otherwise
    (720, 16, (63, 102, 240)),
    (48, 1280, (63, 102, 240)),
    (576, 16, (81, 90, 240)),
  ],
)
@pytest.mark.parametrize("tagged", [False, True])
def test_the_matrix_that_is_not_tagged(tmp_path, height, width, red, tagged):
  """As in players, high definition is BT.709 and all other sizes BT.601."""
  high = height > 576 or width >= 1280

  def setup(stream):
    if tagged:
      stream.codec_context.colorspace = 1 if high else 6

  frame = _planes([red], "yuv420p", height, width)
  path = _write(tmp_path / "a.mkv", [frame], codec="ffv1", setup=setup)
  by_709 = {(63, 102, 240): (254, 0, 0), (81, 90, 240): (255, 24, 0)}
  expected = by_709[red] if high else (254, 0, 0)
  assert np.abs(_strips(path, 1)[0] - expected).max() <= 2


@pytest.mark.parametrize(
  ("tag", "number", "name"),
  [
    ("colorspace", 8, "YCgCo"),
    ("colorspace", 10, "constant-luminance BT.2020"),
    ("colorspace", 14, "ICtCp"),
    ("color_trc", 9, "logarithmic"),
    ("color_trc", 8, "linear"),
  ],
)
def test_colours_that_are_not_read_are_refused_by_name(
  tmp_path, tag, number, name
):
  def setup(stream):
    setattr(stream.codec_context, tag, number)

  path = _write(
    tmp_path / "a.mp4", [_planes([(80, 90, 110)], "yuv420p")], setup=setup
  )
  for function in (video.probe, recordings.read):
    with pytest.raises(errors.UserError, match=f"a.mp4 has colours .*{name}"):
      function(path)


@pytest.mark.parametrize("form", ["bgra", "pal8"])
def test_transparent_parts_of_a_video_are_white(tmp_path, form):
  array = np.zeros((16, 32, 4), np.uint8)
  array[:, :16] = (10, 200, 30, 255)
  array[:, 16:24] = (200, 100, 0, 128)
  if form == "bgra":
    frame = av.VideoFrame.from_ndarray(array, format="rgba")
    frame = frame.reformat(format="bgra")
  else:
    index = np.repeat([[0] * 16 + [1] * 8 + [2] * 8], 16, 0).astype(np.uint8)
    palette = np.zeros((256, 4), np.uint8)
    palette[:3] = [[a, r, g, b] for r, g, b, a in array[0, [0, 16, 24]]]
    frame = av.VideoFrame.from_ndarray((index, palette), format="pal8")
  name, codec = ("a.mkv", "ffv1") if form == "bgra" else ("a.mov", "png")
  path = _write(tmp_path / name, [frame], codec=codec)
  found = _strips(path, 4)
  expected = [(10, 200, 30)] * 2 + [(227, 177, 127), (255, 255, 255)]
  assert np.abs(found - expected).max() <= 2


# --- fields, streams ----------------------------------------------------------


def test_interlaced_recordings_are_deinterlaced(tmp_path):
  """A bar that moves between the fields leaves no comb."""
  moments = np.full((16, 64, 96), 40, np.uint8)
  for i, moment in enumerate(moments):
    moment[8:56, 8 + 5 * i : 20 + 5 * i] = 220
  woven = moments[::2].copy()
  woven[:, ::2] = moments[1::2, ::2]  # the lower field comes first

  def setup(stream):
    stream.options = {"crf": "2", "x264-params": "bff=1"}

  frames = [
    av.VideoFrame.from_ndarray(x, format="gray").reformat(format="yuv420p")
    for x in woven
  ]
  path = _write(tmp_path / "a.mp4", frames, setup=setup)
  found = recordings.read(path)[..., 0].astype(int)
  assert len(found) == video.probe(path).frames == 8

  def comb(x):
    x = x[:, 12:52].astype(int)
    return np.abs(x[:, 1:-1] - (x[:, :-2] + x[:, 2:]) / 2).mean()

  assert comb(woven) > 10 > 3 > comb(found)
  # Each frame is of the moment of its first field.
  for frame, moment in zip(found[2:6], moments[4:12:2], strict=True):
    assert np.abs(frame[12:52] - moment[12:52]).mean() < 3
  times = [f.seconds for f in video.frames(path)]
  assert times == pytest.approx(np.arange(8) / 16)


def test_progressive_recordings_are_left_alone(tmp_path, monkeypatch):
  def fail(*_):
    raise AssertionError

  monkeypatch.setattr(av.filter, "Graph", fail)
  path = _write(tmp_path / "a.mp4", [_corners()] * 3)
  assert len(recordings.read(path)) == 3


def test_of_several_streams_the_largest_is_read_and_this_is_said(tmp_path):
  path = tmp_path / "a.mkv"
  with av.open(str(path), "w") as container:
    streams = []
    for size in (16, 48, 32):
      stream = container.add_stream("libx264", rate=16)
      stream.height = stream.width = size
      stream.pix_fmt = "yuv420p"
      stream.disposition = 0
      streams.append(stream)
    for stream in streams:
      array = np.full((stream.height, stream.width, 3), 90, np.uint8)
      for _ in range(3):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(array)))
      container.mux(stream.encode(None))
  with pytest.warns(UserWarning, match="has 3 video streams, .* stream 1 is"):
    assert recordings.read(path).shape == (3, 48, 48, 3)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    assert video.probe(path).height == 48


def test_geometry_without_a_matrix():
  frame = av.VideoFrame(64, 48, "yuv420p")
  found = pixels.geometry(frame, None)
  assert found == (1.0, False, False, False, 0.0)
  assert found.shown(48, 64) == (48, 64)


def test_transparency_that_is_not_read_is_said(tmp_path):
  array = np.zeros((32, 32, 4), np.uint8)
  array[:, :16] = (200, 30, 30, 255)
  frame = av.VideoFrame.from_ndarray(array, format="rgba")
  frame = frame.reformat(format="yuva420p")
  path = _write(tmp_path / "a.webm", [frame], codec="libvpx-vp9")
  with pytest.warns(UserWarning, match="a.webm is partly transparent"):
    assert np.abs(recordings.read(path)[0, :, 4] - (200, 30, 30)).max() < 9
