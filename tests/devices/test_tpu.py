"""Compiled for TPUs that are not there; see `make test-devices`."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dcvideogen_jax.ops.attention import BlockCausal, TeacherForcing, splash
from dcvideogen_jax.plan import hardware, training
from tests.devices import steps

pytestmark = pytest.mark.devices

CHIPS = {
  "TPU v4": "v4:2x2x1",
  "TPU v5 lite": "v5e:2x2",
  "TPU v5": "v5p:2x2x1",
  "TPU v6 lite": "v6e:2x2",
  "TPU v9": "v5e:2x2",  # One that is not known, so that blocks are small.
}


@pytest.fixture(scope="module")
def v5p():
  return hardware.find("v5p:2x2x1")


@pytest.mark.parametrize("name", steps.SMALL)
def test_a_step_of_training(v5p, name):
  found = training.measure(steps.config(name), v5p)
  assert found["flops"] > 0
  assert found["bytes"]["peak"] < found["bytes"]["capacity"]


def test_image_to_video_of_14b(v5p):
  """7800 latent tokens and the 257 that CLIP gives."""
  found = training.measure(steps.config("adapt:wan_i2v_14b,phase=lora"), v5p)
  assert found["batch"]["image"] == (32, 257, 1280)
  assert found["bytes"]["peak"] < found["bytes"]["capacity"]


def _compiles(device, function):
  where = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((1, 7800, 2, 128), jnp.bfloat16, sharding=where)

  def loss(*inputs):
    return function(*inputs).astype(jnp.float32).sum()

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  gradients.lower(x, x, x).compile()


@pytest.mark.parametrize("kind", [*splash.BLOCKS, "TPU v9"])
def test_gradients_of_splash(kind):
  """Ragged tokens, in the blocks for the chip."""
  device = hardware.find(CHIPS[kind]).devices[0]
  assert kind in (device.device_kind, "TPU v9")
  blocks = splash.blocks(kind)
  _compiles(device, functools.partial(splash.splash, blocks=blocks))


@pytest.mark.parametrize("name", ["v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("mask", [BlockCausal(780), TeacherForcing(780, 3900)])
def test_gradients_of_splash_with_a_mask(name, mask):
  device = hardware.find(name).devices[0]
  blocks = splash.blocks(device.device_kind)
  _compiles(device, functools.partial(splash.splash, mask=mask, blocks=blocks))
