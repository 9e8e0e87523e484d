"""The program's files say what the model does, at any size and length."""

import functools
import json

import av
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import levels
from dcvideogen_jax.data import video
from dcvideogen_jax.eval import images
from tests.launch import launching


def run(programs, *, model, source, output, **flags):
  finished = programs.run(
    "launch.reconstruct",
    f"--model={model}",
    f"--input={source}",
    f"--output={output}",
    *(f"--{name}={value}" for name, value in flags.items()),
  )
  assert finished.code == 0, finished.stderr
  assert not launching.complaints(finished.stderr)

  def refuse(token):
    raise AssertionError(f"{token} is no JSON")

  text = (output / "metrics.json").read_text()
  return json.loads(text, parse_constant=refuse)


def read(path):
  return np.stack(list(video.read_frames(path)))


def quick(function, *arguments):
  """Calls a function once: compiled, but not for long."""
  compiled = jax.jit(function).lower(*arguments)
  return compiled.compile({"xla_backend_optimization_level": 0})(*arguments)


def whole(module, variables, frames):
  """What the model makes of a clip in one go, as uint8."""
  x = jnp.asarray(frames, jnp.float32)[None] / 127.5 - 1
  y = quick(module.apply, variables, x)
  t, h, w, _ = frames.shape
  return levels.to_uint8(y[0, :t, :h, :w])


@pytest.mark.parametrize(
  ("t", "h", "w"), [(19, 16, 24), (5, 17, 31), (1, 10, 12)]
)
def test_video_of_any_size(programs, model, tmp_path, t, h, w):
  directory, module, variables = model
  source = launching.write_video(
    tmp_path / "in.mp4", launching.clip(t, h, w, seed=t)
  )
  output = tmp_path / "new" / "out"
  metrics = run(programs, model=directory, source=source, output=output, crf=0)
  assert sorted(p.name for p in output.iterdir()) == [
    "contact_sheet.png",
    "metrics.json",
    "reconstruction.mp4",
    "side_by_side.mp4",
  ]
  frames = read(source)
  expected = whole(module, variables, frames)
  # uint8 rounding of ties moves a frame's PSNR in the fourth digit.
  np.testing.assert_allclose(
    metrics["psnr"]["per_frame"], images.psnr(frames, expected), atol=2e-3
  )
  np.testing.assert_allclose(
    metrics["ssim"]["per_frame"], images.ssim(frames, expected), atol=2e-4
  )
  assert metrics["psnr"]["mean"] == pytest.approx(
    np.mean(metrics["psnr"]["per_frame"]), abs=1e-3
  )
  assert metrics["frames"] == metrics["input"]["frames"] == t
  assert (
    video.probe(source).fps == video.probe(output / "reconstruction.mp4").fps
  )

  reconstruction = read(output / "reconstruction.mp4")
  assert reconstruction.shape == frames.shape
  both = read(output / "side_by_side.mp4")
  assert both.shape == (t, h, 2 * w, 3)
  # Chroma is subsampled, which blurs the noise that a random model makes.
  for found, true in (
    (both[:, :, :w], frames),
    (both[:, :, w:], expected),
    (reconstruction, expected),
  ):
    assert np.corrcoef(found.ravel(), true.ravel())[0, 1] > 0.6


@pytest.mark.parametrize("size", [(16, 24), (13, 21)])
def test_image(programs, model, tmp_path, size):
  directory, module, variables = model
  image = launching.clip(1, *size)[0]
  PIL.Image.fromarray(image).save(tmp_path / "in.png")
  output = tmp_path / "out"
  metrics = run(
    programs, model=directory, source=tmp_path / "in.png", output=output
  )
  x = jnp.asarray(image, jnp.float32)[None] / 127.5 - 1
  h, w = size

  def reconstruct(module, x):
    return module.decode_image(module.encode_image(x))

  apply = functools.partial(module.apply, method=reconstruct)
  y = quick(apply, variables, x)
  expected = levels.to_uint8(y[0, :h, :w])
  found = np.asarray(PIL.Image.open(output / "reconstruction.png"))
  assert np.abs(found.astype(int) - expected).max() <= 1
  assert np.mean(found != expected) < 0.01
  both = np.asarray(PIL.Image.open(output / "side_by_side.png"))
  np.testing.assert_array_equal(both, np.concatenate([image, found], axis=1))
  assert metrics["compression"]["latent_frames"] == 1
  assert metrics["psnr"]["mean"] == pytest.approx(
    images.psnr(image[None], found[None])[0]
  )


def avi_that_claims_8_of_19_frames(path):
  """Its header is wrong; its frames are all there."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("ffv1", rate=16)
    stream.height, stream.width, stream.pix_fmt = 16, 24, "bgr0"
    for array in launching.clip(19, 16, 24, seed=3):
      frame = av.VideoFrame.from_ndarray(array, format="rgb24")
      container.mux(stream.encode(frame.reformat(format="bgr0")))
    container.mux(stream.encode(None))
  content = bytearray(path.read_bytes())
  at = content.index(b"strh") + 8 + 32
  assert content[at : at + 4] == (19).to_bytes(4, "little")
  content[at : at + 4] = (8).to_bytes(4, "little")
  path.write_bytes(content)
  return path


@pytest.mark.parametrize("time", ["causal", "non_causal"])
def test_other_temporal_designs(programs, tmp_path, time):
  directory, module, variables = launching.save_model(
    tmp_path / "model", time=time
  )
  # A clip without causality is one chunk, whatever the container claims.
  source = avi_that_claims_8_of_19_frames(tmp_path / "in.avi")
  metrics = run(
    programs, model=directory, source=source, output=tmp_path / "out"
  )
  frames = read(source)
  np.testing.assert_allclose(
    metrics["psnr"]["per_frame"],
    images.psnr(frames, whole(module, variables, frames)),
    atol=2e-3,
  )
  assert metrics["settings"]["config"]["time"] == time
  assert metrics["frames"] == metrics["input"]["frames"] == 19


def test_bands_change_nothing(programs, model, tmp_path):
  source = launching.write_video(
    tmp_path / "in.mp4", launching.clip(11, 60, 24)
  )
  found = [
    run(
      programs,
      model=model[0],
      source=source,
      output=tmp_path / f"{gib}",
      memory_budget_gib=gib,
    )
    for gib in (1, 0.0005)
  ]
  plans = [m["settings"]["plans"]["decode"]["cut"] for m in found]
  assert plans[0] is None and plans[1] is not None
  np.testing.assert_allclose(
    found[0]["psnr"]["per_frame"], found[1]["psnr"]["per_frame"], atol=2e-3
  )


def test_another_decoder(programs, tmp_path):
  directory, module, variables = launching.save_model(tmp_path / "model")
  frames = launching.clip(9, 16, 24)
  source = launching.write_video(tmp_path / "in.mp4", frames)
  arguments = {"model": directory, "source": source}
  finished = programs.run(
    "launch.reconstruct",
    f"--model={directory}",
    f"--input={source}",
    f"--output={tmp_path / 'refused'}",
    "--decoder=fast",
  )
  assert finished.code == 2 and not (tmp_path / "refused").exists()
  (sentence,) = finished.stderr.splitlines()
  assert "configs/tiny.py:autoencoder,phase=fast" in sentence
  other, half = launching.save_decoder(tmp_path / "model_fast")
  output = tmp_path / "out"
  metrics = run(programs, **arguments, output=output, decoder="fast")
  frames = read(source)
  encode, decode = (
    functools.partial(m.apply, method=method)
    for m, method in ((module, "encode"), (other, "decode"))
  )
  video = jnp.asarray(frames, jnp.float32)[None] / 127.5 - 1
  latents = quick(encode, variables, video)
  expected = levels.to_uint8(quick(decode, half, latents)[0, :9])
  np.testing.assert_allclose(
    metrics["psnr"]["per_frame"], images.psnr(frames, expected), atol=2e-3
  )
  assert metrics["settings"]["decoder"] == "fast"
  assert metrics["settings"]["config"]["widths"] == [8, 8, 8]


def test_official_rule_for_the_last_frames(programs, model, tmp_path):
  directory, module, variables = model
  source = launching.write_video(
    tmp_path / "in.mp4", launching.clip(12, 16, 24)
  )
  metrics = run(
    programs,
    model=directory,
    source=source,
    output=tmp_path / "out",
    frames_rule="official",
  )
  frames = read(source)
  # A chunk of 8, then 4 frames on their own, bidirectional.
  alone = whole(module.unchunked(), variables, frames[8:])
  expected = np.concatenate([whole(module, variables, frames[:8]), alone])
  np.testing.assert_allclose(
    metrics["psnr"]["per_frame"], images.psnr(frames, expected), atol=2e-3
  )


def test_size_and_length_can_be_chosen(programs, model, tmp_path):
  source = launching.write_video(tmp_path / "in.mp4", launching.clip(9, 16, 24))
  metrics = run(
    programs,
    model=model[0],
    source=source,
    output=tmp_path / "out",
    height=15,
    max_frames=3,
    dtype="bfloat16",
  )
  assert metrics["frames"] == 3
  reconstruction = read(tmp_path / "out" / "reconstruction.mp4")
  assert reconstruction.shape == (3, 15, 22, 3)
  assert metrics["settings"]["parameter_dtypes"] == ["bfloat16"]


def test_metrics_tell_where_time_and_memory_went(programs, model, tmp_path):
  source = launching.write_video(tmp_path / "in.mp4", launching.clip(8, 16, 24))
  metrics = run(
    programs, model=model[0], source=source, output=tmp_path / "out"
  )
  seconds = metrics["seconds"]
  assert {"load", "compile", "encode", "decode", "read"} < set(seconds)
  total = seconds.pop("total")
  assert sum(seconds.values()) == pytest.approx(total, abs=0.02)
  assert all(s >= 0 for s in seconds.values())
  assert 1e8 < metrics["memory"]["peak_rss_bytes"] < 1e10
  # 8 frames of 16x24 pixels become 2 of 8x12 positions with 4 channels.
  assert metrics["compression"]["ratio"] == 8 * 16 * 24 * 3 / (2 * 8 * 12 * 4)
  assert metrics["versions"]["jax"] == jax.__version__
  comment = video.probe(tmp_path / "out" / "reconstruction.mp4").comment
  assert json.loads(comment) == metrics["settings"]


def test_files_are_replaced_only_by_complete_ones(programs, model, tmp_path):
  output = tmp_path / "out"
  source = launching.write_video(tmp_path / "in.mp4", launching.clip(8, 16, 24))
  run(programs, model=model[0], source=source, output=output)
  before = {p.name: p.read_bytes() for p in output.iterdir()}
  data = launching.write_video(
    tmp_path / "long.mp4", launching.clip(64, 16, 24)
  ).read_bytes()
  (tmp_path / "cut.mp4").write_bytes(damaged(data))
  finished = programs.run(
    "launch.reconstruct",
    f"--model={model[0]}",
    f"--input={tmp_path / 'cut.mp4'}",
    f"--output={output}",
  )
  assert finished.code == 2
  assert {p.name: p.read_bytes() for p in output.iterdir()} == before


def damaged(mp4: bytes) -> bytes:
  """Noise in the last third of the pictures, so that decoding starts well."""
  start, end = mp4.index(b"mdat") + 4, len(mp4)
  middle = start + 2 * (end - start) // 3
  noise = np.random.default_rng(0).bytes(end - middle)
  return mp4[:middle] + noise
