"""Streamed and banded results equal whole ones; `plan` keeps its budget."""

import functools
import itertools

import jax
import numpy as np
import pytest

from benchmarks import blended
from dcvideogen_jax import convert, errors, levels
from dcvideogen_jax.models import bands, calls, dc_ae_v, streaming, wan_vae
from tests import golden_data, random_weights

NAME = "f32t4_chunk8"
# Share of the largest value by which two orders of the same sums may differ.
EXACT = 1e-5


@functools.cache
def load():
  return convert.load(
    "dc_ae_v",
    golden_data.weights("dc_ae_v", NAME),
    golden_data.DC_AE_V[NAME],
  )


@functools.cache
def small(time="chunk_causal"):
  """Returns a random model of three halvings, whose norms are random too."""
  module = dc_ae_v.build(golden_data.SMALL, time=time)
  video = jax.ShapeDtypeStruct((1, 8, 8, 8, 3), np.float32)
  return module, random_weights.of(module, video, vectors=0.05, norms=1.0)


@functools.cache
def video(frames, height, width):
  rng = np.random.default_rng(height)
  x = rng.uniform(-1, 1, (1, frames, height, width, 3))
  return x.astype(np.float32)


def whole(module, variables, x, method):
  return np.asarray(random_weights.jitted(module, method)(variables, x))


def assert_same(found, expected):
  largest = max(1, np.abs(expected).max())
  np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT * largest)


def pieces(x, frames):
  return [x[:, i : i + frames] for i in range(0, x.shape[1], frames)]


def joined(parts):
  return np.concatenate([*map(np.asarray, parts)], axis=1)


def golden():
  return golden_data.io("dc_ae_v", NAME)


@pytest.mark.parametrize("time", ["chunk_causal", "causal"])
@pytest.mark.parametrize("frames", [1, 5, 24])
def test_streamed_equals_whole(time, frames):
  module, variables = small(time)
  x = video(24, 16, 24)
  z = joined(streaming.encode(module, variables, pieces(x, frames)))
  expected = whole(module, variables, x, "encode")
  assert_same(z, expected)
  y = joined(streaming.decode(module, variables, pieces(z, frames)))
  expected = whole(module, variables, z, "decode")
  assert_same(y, expected)


def test_streamed_is_the_reference_tile_by_tile():
  module, variables = load()
  z = joined(streaming.encode(module, variables, pieces(golden()["in.x"], 9)))
  np.testing.assert_allclose(z, golden()["out.tile_T24.z"], rtol=0, atol=2e-5)
  y = joined(streaming.decode(module, variables, pieces(z, 1)))
  np.testing.assert_allclose(
    y[..., ::3, ::3, :], golden()["out.tile_T24.y@s3"], rtol=0, atol=2e-5
  )


def test_non_causal_cannot_be_streamed():
  module, variables = small("non_causal")
  with pytest.raises(ValueError, match="non_causal"):
    next(streaming.encode(module, variables, [video(24, 16, 24)]))


def test_official_tail_is_the_reference_tile_by_tile():
  module, variables = load()
  z = joined(
    streaming.encode(
      module, variables, [golden()["in.x"][:, :12]], tail="official"
    )
  )
  np.testing.assert_allclose(z, golden()["out.tile_T12.z"], rtol=0, atol=2e-5)
  y = joined(streaming.decode(module, variables, [z], tail="official"))
  np.testing.assert_allclose(
    y[..., ::3, ::3, :], golden()["out.tile_T12.y@s3"], rtol=0, atol=2e-5
  )


def test_state_is_the_reference_feature_cache():
  """One frame per convolution, the last one of its input."""
  module, variables = load()
  x = golden()["in.x"][:, :8]
  _, state = random_weights.jitted(module, mutable="cache")(variables, x)
  prefix = "out.cache_T8.cache."
  names = [key for key in golden() if key.startswith(prefix)]
  assert len(names) == len(jax.tree.leaves(state)) == 42
  for key in names:
    name = key.removeprefix(prefix).removesuffix("@s3").strip(".")
    name = name.replace("project_out.op_list.2", "project_out")
    name = name.replace("stages.", "stages_").replace("op_list.", "op_list_")
    found = state["cache"]
    for part in name.replace(".main.", ".").split("."):
      found = found[part]
    found = found["frames"]
    found = found[..., ::3, ::3, :] if key.endswith("@s3") else found
    expected = golden()[key][0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_pixels_in_and_out(dtype):
  module, variables = small()
  pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 40, 50, 3), "uint8")
  x = pixels.astype(np.float32) / 127.5 - 1
  z = joined(streaming.encode(module, variables, [pixels]))
  expected = whole(module, variables, x, "encode")
  assert_same(z, expected)
  y = joined(streaming.decode(module, variables, [z], dtype=dtype))
  assert y.dtype == dtype
  expected = whole(module, variables, z, "decode")
  if dtype == np.uint8:
    expected = levels.to_uint8(expected).astype(int)
    assert np.abs(y - expected).max() <= 1
    assert np.mean(y != expected) < 1e-3
  else:
    assert_same(y, expected)


def test_empty_and_changing_video_are_refused():
  module, variables = small()
  with pytest.raises(ValueError, match="no frames"):
    next(streaming.encode(module, variables, []))
  with pytest.raises(ValueError, match="no latents"):
    next(streaming.decode(module, variables, []))
  x = video(24, 16, 24)
  with pytest.raises(ValueError, match="change"):
    next(streaming.encode(module, variables, [x[:, :4], x[:, :4, :8]]))


@pytest.mark.parametrize(
  "plan", [bands.BandPlan(), bands.BandPlan(cut=2, rows=3)]
)
def test_official_tail_takes_whole_latent_frames(plan):
  """The number of frames in all pieces together counts."""
  module, variables = small()
  x = video(10, 16, 24)
  pieces = streaming.encode(
    module, variables, [x[:, :3], x[:, 3:]], plan=plan, tail="official"
  )
  with pytest.raises(errors.UserError, match="multiple of 4 frames, found 10"):
    joined(pieces)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"tail": "zero"}, "tail must be one of pad, official, found 'zero'"),
    (
      {"plan": bands.BandPlan(cut=9, rows=1)},
      "a stage from 1 to .* found stage 9",
    ),
    (
      {"plan": bands.BandPlan(cut=1)},
      "1 row or more, found stage 1 and 0 rows",
    ),
  ],
)
def test_ways_that_there_are_not(change, message):
  module, variables = small()
  for run, x in (
    (streaming.encode, video(8, 16, 24)),
    (streaming.decode, np.zeros((1, 2, 1, 1, module.latent_channels))),
  ):
    with pytest.raises(errors.UserError, match=message):
      next(run(module, variables, [x], **change))


@pytest.mark.parametrize(
  ("x", "message"),
  [
    (np.zeros((1, 8, 16, 24, 4), np.uint8), "a video has 3 channels"),
    (np.zeros((1, 8, 16, 24, 3), int), "uint8, 0 to 255, or float, .* int64"),
    (np.full((1, 8, 16, 24, 3), np.nan), "within -1 to 1, found values from n"),
    (255 * np.ones((1, 8, 16, 24, 3)), "found values from 255 to 255"),
  ],
)
def test_what_is_no_video(x, message):
  """The second piece of a stream is checked too."""
  module, variables = small()
  pieces = streaming.encode(module, variables, [video(8, 16, 24), x])
  with pytest.raises(errors.UserError, match=message):
    next(pieces)
  vae, of_vae = wan_vae.WanVAE(), {}
  with pytest.raises(errors.UserError, match=message):
    next(wan_vae.stream_encode(vae, of_vae, [x]))


def test_latents_of_another_model():
  module, variables = small()
  z = np.zeros((1, 2, 2, 3, module.latent_channels + 1), np.float32)
  with pytest.raises(errors.UserError, match="latents are floats with"):
    next(streaming.decode(module, variables, [z]))
  with pytest.raises(errors.UserError, match="latents are floats with 16"):
    next(wan_vae.stream_decode(wan_vae.WanVAE(), {}, [z]))


@functools.cache
def _reference(height, width, time="chunk_causal"):
  """Returns a video of two chunks and a tail, its latents, and it decoded."""
  module, variables = small(time)
  x = video(18, height, width)
  z = whole(module, variables, x, "encode")
  return x, z, whole(module, variables, z, "decode")


# At every cut; the last band is full for some of them, and not for others.
@pytest.mark.parametrize(
  ("size", "plan"),
  [
    ((48, 32), bands.BandPlan(cut=1, rows=10)),
    ((48, 32), bands.BandPlan(cut=2, rows=3, offload=True)),
    ((75, 35), bands.BandPlan(cut=2, rows=3, offload=True)),
    ((75, 35), bands.BandPlan(cut=4, rows=1, offload=True)),
    ((100, 17), bands.BandPlan(cut=1, rows=10)),
    ((100, 17), bands.BandPlan(cut=3, rows=2)),
  ],
  ids=lambda x: f"cut{x.cut}" if isinstance(x, bands.BandPlan) else str(x),
)
def test_banded_equals_whole(size, plan):
  module, variables = small()
  x, z, y = _reference(*size)
  found = joined(streaming.encode(module, variables, pieces(x, 7), plan=plan))
  assert_same(found, z)
  found = joined(streaming.decode(module, variables, pieces(z, 1), plan=plan))
  assert_same(found, y)


def test_banded_equals_whole_in_the_causal_design():
  module, variables = small("causal")
  x, z, y = _reference(48, 32, "causal")
  plan = bands.BandPlan(cut=3, rows=2)
  found = joined(streaming.encode(module, variables, [x], plan=plan))
  assert_same(found[:, :5], z)
  found = joined(streaming.decode(module, variables, [z], plan=plan))
  assert_same(found, y)


def test_banded_is_the_reference():
  """The released depth of seven stages, at an odd cut."""
  module, variables = load()
  plan = bands.BandPlan(cut=5, rows=1)
  x = golden()["in.x"]
  z = joined(streaming.encode(module, variables, [x], plan=plan))
  np.testing.assert_allclose(z, golden()["out.tile_T24.z"], rtol=0, atol=2e-5)
  y = joined(streaming.decode(module, variables, [z], plan=plan))
  np.testing.assert_allclose(
    y[..., ::3, ::3, :], golden()["out.tile_T24.y@s3"], rtol=0, atol=2e-5
  )


def test_one_compiled_function_serves_all_bands_and_chunks():
  module, variables = small()
  z = _reference(75, 35)[1]
  before = calls.apply._cache_size()
  plan = bands.BandPlan(cut=3, rows=4, offload=True)
  list(streaming.decode(module, variables, [z], plan=plan))
  # The coarse part and the fine part compile once each, and one of them again:
  # jit distinguishes a state on the device from one that comes from the host.
  assert calls.apply._cache_size() - before <= 3


@pytest.mark.parametrize("offload", [False, True])
def test_the_state_of_bands_is_made_once(monkeypatch, offload):
  """Chunks after the first one reuse the state of the one before."""
  module, variables = small()
  x, z, _ = _reference(75, 35)  # Three chunks.
  traced = []

  def eval_shape(function, *args):
    if function.__module__ == calls.__name__:
      traced.append(function)
    return real(function, *args)

  real = jax.eval_shape
  monkeypatch.setattr(jax, "eval_shape", eval_shape)
  plan = bands.BandPlan(cut=3, rows=4, offload=offload)
  list(streaming.encode(module, variables, [x], plan=plan))
  assert len(traced) == 2  # The states of the fine and of the coarse part.
  list(streaming.decode(module, variables, [z], plan=plan))
  assert len(traced) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
  ("case", "image", "tile", "overlap", "frames"),
  [
    ("spatial64_o50_T8", "in.x", 64, 0.5, 8),
    ("spatial128_o25_T4", "in.xs4", 128, 0.25, 4),
  ],
)
def test_blended_tiles_are_the_reference(case, image, tile, overlap, frames):
  module, variables = load()
  x = golden()[image][:, :frames]
  z = blended.encode(module, variables, x, tile=tile, overlap=overlap)
  np.testing.assert_allclose(z, golden()[f"out.{case}.z"], rtol=0, atol=2e-5)
  y = blended.decode(module, variables, z, tile=tile, overlap=overlap)
  np.testing.assert_allclose(
    y[..., ::3, ::3, :], golden()[f"out.{case}.y@s3"], rtol=0, atol=2e-5
  )


BF16 = jax.numpy.bfloat16


@pytest.mark.parametrize(
  ("decode", "gib"),
  # The rows that convolutions keep at 4K take more than 8 GiB in encoding.
  [*itertools.product([True], [8, 16, 24, 60]), (False, 12), (False, 24)],
)
@pytest.mark.parametrize(
  "size",
  [
    (704, 1280),
    (2176, 3840),
    *(
      pytest.param(size, marks=pytest.mark.slow)
      for size in ((480, 832), (1088, 1920), (5760, 1440))
    ),
  ],
)
def test_plan_keeps_its_budget(size, gib, decode):
  module = dc_ae_v.build(dc_ae_v.VARIANTS["f32t4c32"], dtype=BF16)
  plan = bands.plan(module, *size, gib * 2**30, decode=decode)
  assert plan.bytes <= gib * 2**30
  assert 1 <= plan.work <= 1.32
  if plan.cut is None:
    assert plan.work == 1


def test_plan_takes_the_whole_frame_when_it_fits():
  module = dc_ae_v.build(dc_ae_v.VARIANTS["f32t4c32"], dtype=BF16)
  plan = bands.plan(module, 704, 1280, 60 * 2**30, decode=True)
  assert plan.cut is None


def test_plan_keeps_state_on_the_device_when_it_fits():
  module = dc_ae_v.build(dc_ae_v.VARIANTS["f32t4c32"], dtype=BF16)
  assert bands.plan(module, 2176, 3840, 2**34, decode=True).offload
  assert not bands.plan(module, 2176, 3840, 2**36, decode=True).offload
  one = bands.plan(module, 2176, 3840, 2**34, decode=True, streamed=False)
  assert not one.offload


def test_plan_for_a_tpu_leaves_room_for_layouts():
  module = dc_ae_v.build(dc_ae_v.VARIANTS["f32t4c32"], dtype=BF16)
  size, options = (704, 1280), {"decode": True, "devices": 4}
  gpu = bands.plan(module, *size, 2**34, **options, platform="gpu")
  tpu = bands.plan(module, *size, 2**34, **options, platform="tpu")
  assert gpu.cut is tpu.cut is None
  assert tpu.bytes == int(1.9 * gpu.bytes)
  assert bands.plan(module, *size, 2**33, **options, platform="tpu").cut


@pytest.mark.parametrize("size", [(0, 64), (64, -32), (64, 64.0)])
def test_sizes_that_cannot_be_planned(size):
  with pytest.raises(errors.UserError, match="must be at least 1, found"):
    bands.plan(small()[0], *size, 1e9, decode=True)


def test_plan_that_cannot_be_says_what_would_do():
  module = dc_ae_v.build(dc_ae_v.VARIANTS["f32t4c32"], dtype=BF16)
  with pytest.raises(errors.UserError, match="at least"):
    bands.plan(module, 2176, 3840, 2**30, decode=True)
