"""DC-AE-V against DC-Gen commit cae2205, and its own properties."""

import functools

import flax.traverse_util
import jax
import numpy as np
import pytest

from dcvideogen_jax import convert
from dcvideogen_jax.models import dc_ae_v
from tests import golden_data, random_weights

LATENTS = 2e-5  # max abs; also for the video
ACTIVATIONS = 1e-4


@functools.cache
def load(name="f32t4_chunk8"):
  return convert.load(
    "dc_ae_v", golden_data.weights("dc_ae_v", name), golden_data.DC_AE_V[name]
  )


def run(x, method, name="f32t4_chunk8", **fields):
  module, variables = load(name)
  apply = random_weights.jitted(module.clone(**fields), method)
  return np.asarray(apply(variables, x))


def thirds(video):
  """Takes every third row and column, as entries "@s3" of golden files do."""
  return video[..., ::3, ::3, :]


@pytest.mark.parametrize(
  ("name", "case", "frames"),
  [("f32t4_chunk8", "tile_T24", 24), ("f64t4_chunk8", "tile_T16", 16)],
)
def test_whole_clip_equals_the_reference_tile_by_tile(name, case, frames):
  golden = golden_data.io("dc_ae_v", name)
  z = run(golden["in.x"][:, :frames], "encode", name)
  np.testing.assert_allclose(z, golden[f"out.{case}.z"], rtol=0, atol=LATENTS)
  y = run(z, "decode", name)
  np.testing.assert_allclose(
    thirds(y), golden[f"out.{case}.y@s3"], rtol=0, atol=LATENTS
  )


def test_decodes_latents_that_no_encoder_made():
  golden = golden_data.io("dc_ae_v", "f32t4_chunk8")
  y = run(golden["in.zr"], "decode")
  expected = golden["out.decode_random_latent.y@s3"]
  np.testing.assert_allclose(thirds(y), expected, rtol=0, atol=LATENTS)


def test_ragged_clip_repeats_its_last_frame():
  golden = golden_data.io("dc_ae_v", "f32t4_chunk8")
  z = run(golden["in.x"][:, :13], "encode")
  expected = golden["out.reconstruct_video_T13.z"]
  np.testing.assert_allclose(z, expected, rtol=0, atol=LATENTS)
  y = run(z, "decode")[:, :13]
  expected = golden["out.reconstruct_video_T13.y@s3"]
  np.testing.assert_allclose(thirds(y), expected, rtol=0, atol=LATENTS)


def test_image_is_one_latent_frame():
  golden = golden_data.io("dc_ae_v", "f32t4_chunk8")
  z = run(golden["in.x"][:, 0], "encode_image")
  expected = golden["out.reconstruct_image.z"]
  assert z.shape == (1, 1, 2, 3, 8)
  np.testing.assert_allclose(z, expected, rtol=0, atol=LATENTS)
  y = run(z, "decode_image")
  expected = np.moveaxis(golden["out.reconstruct_image.y@s3"], 1, -1)
  np.testing.assert_allclose(y[:, ::3, ::3], expected, rtol=0, atol=LATENTS)


def test_unchunked_equals_the_reference_falling_back():
  golden = golden_data.io("dc_ae_v", "f32t4_chunk8")
  z = run(golden["in.x"][:, :12], "encode", time="non_causal")
  expected = golden["out.notile_T12.z"]
  np.testing.assert_allclose(z, expected, rtol=0, atol=LATENTS)
  y = run(z, "decode", time="non_causal")
  expected = golden["out.notile_T12.y@s3"]
  np.testing.assert_allclose(thirds(y), expected, rtol=0, atol=LATENTS)


def _our_name(activation):
  """Returns the path of captured intermediates for a reference's module."""
  name = activation.removesuffix("@s3").replace("stages.", "stages_")
  name = name.replace("op_list.", "op_list_").replace(".main.conv", ".conv")
  name = name.replace(".", "/")
  sown = name.endswith(("main", "shortcut"))
  return name if sown else f"{name}/__call__"


@pytest.mark.parametrize("name", ["f32t4_chunk8", "f64t4_chunk8"])
def test_activations_equal_the_reference(name):
  golden = golden_data.io("dc_ae_v", name)
  module, variables = load(name)

  @jax.jit
  def capture(video):
    return module.apply(variables, video, capture_intermediates=True)[1]

  found = capture(golden["in.x"][:, :16])["intermediates"]
  found = flax.traverse_util.flatten_dict(found, sep="/")
  prefix = "out.notile_T16_stages.act."
  names = [key for key in golden if key.startswith(prefix)]
  assert len(names) >= 9
  for key in names:
    (x,) = found[_our_name(key.removeprefix(prefix))]
    # Convolutions return a shortcut too, and stages a band.
    x = x[0] if isinstance(x, tuple) else x
    x = thirds(x) if key.endswith("@s3") else x
    np.testing.assert_allclose(
      x, golden[key], rtol=0, atol=ACTIVATIONS, err_msg=key
    )


def test_bfloat16_stays_near_float32():
  golden = golden_data.io("dc_ae_v", "f32t4_chunk8")
  x = golden["in.x"][:, :8]
  z = run(x, "encode")
  rounded = run(x, "encode", dtype=jax.numpy.bfloat16)
  assert rounded.dtype == jax.numpy.bfloat16
  assert 1e-4 < np.abs(z - rounded.astype(np.float32)).max() < 0.06


@pytest.mark.parametrize(
  ("variant", "parameters", "tensors"),
  [
    ("f32t4c32", 2_138_635_436, 340),
    ("f32t4c64", 2_140_404_940, 340),
    ("f32t4c128", 2_143_943_948, 340),
    ("f32t4c256", 2_151_021_964, 340),
    ("f64t4c128", 2_717_281_804, 384),
  ],
)
def test_released_variants_have_the_released_size(variant, parameters, tensors):
  module = dc_ae_v.build(dc_ae_v.VARIANTS[variant])
  size = module.spatial_factor
  video = jax.ShapeDtypeStruct((1, 40, size, size, 3), np.float32)
  leaves = jax.tree.leaves(
    jax.eval_shape(module.init, jax.random.key(0), video)
  )
  assert sum(leaf.size for leaf in leaves) == parameters
  assert len(leaves) == tensors


@functools.cache
def small():
  """Returns a random model of three halvings, and a video."""
  module = dc_ae_v.build(golden_data.SMALL)
  video = np.random.default_rng(0).uniform(-1, 1, (1, 24, 16, 24, 3))
  video = video.astype(np.float32)
  return random_weights.of(module, video, norms=1.0), video


def run_small(x, method, time):
  module = dc_ae_v.build(golden_data.SMALL, time=time)
  return np.asarray(random_weights.jitted(module, method)(small()[0], x))


@pytest.mark.parametrize(
  ("time", "first_changed"),
  [("chunk_causal", 2), ("causal", 3), ("non_causal", 0)],
)
def test_each_design_sees_what_it_may(time, first_changed):
  """Editing frame 15, the last of chunk 2, changes latent frames from here."""
  x = small()[1].copy()
  z = run_small(x, "encode", time)
  x[:, 15] += 1
  edited = run_small(x, "encode", time)
  changed = (edited != z).any(axis=(0, 2, 3, 4))
  assert np.flatnonzero(changed)[0] == first_changed


@pytest.mark.parametrize(
  ("time", "first_changed"),
  [("chunk_causal", 8), ("causal", 12), ("non_causal", 0)],
)
def test_each_design_decodes_what_it_may(time, first_changed):
  """Editing latent frame 3, the last of chunk 2, changes frames from here."""
  z = run_small(small()[1], "encode", time).copy()
  y = run_small(z, "decode", time)
  z[:, 3] += 1
  changed = (run_small(z, "decode", time) != y).any(axis=(0, 2, 3, 4))
  assert np.flatnonzero(changed)[0] == first_changed


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"widths": (8, 64, 96, 96, 96, 96, 96)}, "96"),
    ({"depths": (0, 1)}, "depths"),
    ({"spatial_factor": 64}, "spatial_factor"),
    ({"time": "acausal"}, "acausal"),
    ({"chunk_frames": 10}, "chunk_frames"),
    ({"lenght": 3}, "lenght"),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    dc_ae_v.build(golden_data.DC_AE_V["f32t4_chunk8"], **fields)
