"""Smaller decoders of the same latents: their work, in streams and in bands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors, flops, levels
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.models import bands, dc_ae_v
from tests import golden_data, random_weights

MODEL = golden_data.SMALL | {"latent_scale": 0.8}
FAST = MODEL | {"widths": (8, 4, 8, 16, 16), "depths": (0, 1, 1, 1, 1)}


@pytest.mark.parametrize("variant", dc_ae_v.VARIANTS)
def test_a_fifth_of_the_work_for_the_same_latents(variant):
  full, fast = (
    dc_ae_v.build(rows[variant]) for rows in (dc_ae_v.VARIANTS, dc_ae_v.FAST)
  )
  work = [bands.work(m, 2176, 3840, decode=True) for m in (fast, full)]
  assert 0.15 < work[0] / work[1] < 0.2
  fields = [convert.config_of(m) for m in (fast, full)]
  changed = {name for name in fields[0] if fields[0][name] != fields[1][name]}
  assert changed == {"widths", "depths"}


def test_the_work_is_counted_in_the_program():
  """For f32t4c32, by the products of the traced program."""
  module = dc_ae_v.build(dc_ae_v.FAST["f32t4c32"], conv3d="xla")
  latents = jax.ShapeDtypeStruct((1, 10, 1, 1, 32), jnp.float32)
  decode = functools.partial(module.apply, method="decode")
  variables = convert.KINDS["dc_ae_v_decoder"].init(module)
  assert variables["params"].keys() == {"decoder"}
  counted = flops.count(jax.jit(decode).trace(variables, latents).jaxpr.jaxpr)
  full = dc_ae_v.build(dc_ae_v.VARIANTS["f32t4c32"])
  assert counted == bands.work(module, 32, 32, decode=True)
  assert counted <= 0.2 * bands.work(full, 32, 32, decode=True)


@functools.cache
def _pair():
  """A space whose decoder is another model's, and that decoder alone."""
  kinds = ("dc_ae_v", MODEL), ("dc_ae_v_decoder", FAST)
  modules, halves = [], {}
  for kind, fields in kinds:
    modules.append(dc_ae_v.build(fields))
    shapes = convert.KINDS[kind].init(modules[-1])
    halves |= random_weights.like(shapes, vectors=0.05, norms=1.0)["params"]
  variables = {"params": halves}
  return spaces.DCAEVLatents(modules[0], variables, modules[1]), modules[1]


@pytest.mark.parametrize("banded", [False, True])
def test_streams_and_bands_equal_the_whole(banded):
  space, decoder = _pair()
  size, budget = (28, 48, 32), 2.0**30
  if banded:
    budget = bands.least_bytes(decoder, *size[1:], decode=True)
    plan = bands.plan(decoder, *size[1:], budget, decode=True)
    assert plan.cut is not None
  rng = np.random.default_rng(0)
  latents = rng.normal(size=(1, 7, 6, 4, 4)).astype(np.float32)
  whole = random_weights.jitted(decoder, "decode")
  expected = whole(space.variables, latents / MODEL["latent_scale"])
  found = np.concatenate(
    [*space.decode(latents, size, jnp.float32, budget)], axis=1
  )
  expected = levels.to_uint8(np.asarray(expected))
  assert found.shape == expected.shape and np.ptp(expected) > 50
  assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_space_keeps_its_decoder_and_encodes_by_its_own_model():
  space, decoder = _pair()
  assert space.decoder(jnp.float32) == decoder
  again = space.with_variables({"params": {}})
  assert again.decoder(jnp.bfloat16) == decoder.clone(dtype=jnp.bfloat16)
  assert again.variables != space.variables and again.module == space.module
  video = np.random.default_rng(1).uniform(-1, 1, (1, 8, 8, 8, 3))
  found = space.encode_whole(video.astype(np.float32))
  encode = random_weights.jitted(space.module, "encode")
  expected = encode(space.variables, video.astype(np.float32))
  np.testing.assert_allclose(
    found, 0.8 * np.asarray(expected), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_weights_to_pytorch_and_back(tmp_path, suffix):
  space, decoder = _pair()
  variables = {"params": {"decoder": space.variables["params"]["decoder"]}}
  kind = "dc_ae_v_decoder"
  tensors = convert.to_torch(kind, decoder, variables)
  assert all(name.startswith("decoder.") for name in tensors)
  assert tensors["decoder.stages.1.op_list.0.main.conv.conv.weight"].shape == (
    16,
    8,
    3,
    3,
    3,
  )
  path = tmp_path / f"fast{suffix}"
  if suffix:
    convert.write_file(path, kind, decoder, variables)
  else:
    convert.save(path, kind, decoder, variables)
  config = FAST if suffix else None
  module, found = convert.load(kind, path, config)
  assert module == decoder
  jax.tree.map(np.testing.assert_array_equal, found, variables)
  if not suffix:
    with pytest.raises(errors.UserError, match="of a dc_ae_v_decoder, expect"):
      convert.load("dc_ae_v", path)


def test_a_decoder_alone_is_the_reference():
  """The decoder's half of the reference's weights, without the encoder's."""
  name = "f32t4_chunk8"
  weights = golden_data.weights("dc_ae_v", name)
  half = {k: x for k, x in weights.items() if k.startswith("decoder.")}
  fields = golden_data.DC_AE_V[name]
  module, variables = convert.load("dc_ae_v_decoder", half, fields)
  io = golden_data.io("dc_ae_v", name)
  decode = random_weights.jitted(module, "decode")
  found = decode(variables, io["out.tile_T24.z"])[..., ::3, ::3, :]
  expected = io["out.tile_T24.y@s3"]
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
