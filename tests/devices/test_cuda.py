"""Compiled for an H100 that is not there; see `make test-devices`."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dcvideogen_jax import sharding
from dcvideogen_jax.ops import attention
from dcvideogen_jax.ops.attention import BlockCausal, flash
from dcvideogen_jax.plan import hardware, training
from tests.devices import steps

pytestmark = pytest.mark.devices


@pytest.fixture(scope="module")
def h100():
  return hardware.find("h100")


@pytest.mark.parametrize("name", steps.SMALL)
def test_a_step_of_training(h100, name):
  found = training.measure(steps.config(name), h100)
  assert found["flops"] > 0
  assert found["bytes"]["peak"] < found["bytes"]["capacity"]


def test_image_to_video_of_14b(h100):
  """7800 latent tokens and the 257 that CLIP gives; four samples fit."""
  config = steps.config("adapt:wan_i2v_14b,phase=lora") | {"batch_size": 4}
  found = training.measure(config, h100)
  assert found["batch"]["image"] == (4, 257, 1280)
  assert found["bytes"]["peak"] < found["bytes"]["capacity"]


def _gradients(device, n, m, function, dtype=jnp.bfloat16, e=128):
  """The compiled gradients of queries, keys and values, as text."""
  mesh = sharding.make_mesh({}, [device])
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  q, k = (
    jax.ShapeDtypeStruct((1, size, 2, e), dtype, sharding=where)
    for size in (n, m)
  )

  def loss(*inputs):
    return function(*inputs).astype(jnp.float32).sum()

  with jax.set_mesh(mesh):
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k)
    return traced.lower().compile().as_text()


@pytest.mark.parametrize(
  ("n", "m", "mask"),
  [
    (7800, 257, "PADDING"),
    (375, 375, "PADDING"),
    (375, 512, "PADDING"),
    (7800, 512, "NO_MASK"),
  ],
)
def test_gradients_of_cudnn(h100, n, m, mask):
  """Lengths are only given where a number of tokens is odd."""
  text = _gradients(*h100.devices, n, m, attention.attention)
  kernels = ("fmhaSoftmax", "fmhaSoftmaxBackward")
  found = re.findall(r'"__cudnn\$(\w+)".*?"mask_type":\s*"(\w+)"', text)
  assert sorted(found) == [(kernel, mask) for kernel in kernels]


def test_gradients_of_cudnn_in_odd_chunks(h100):
  attend = functools.partial(attention.attention, mask=BlockCausal(125))
  text = _gradients(*h100.devices, 375, 375, attend)
  assert text.count("__cudnn$fmhaSoftmaxBackward") == 3


@pytest.mark.filterwarnings(
  # jax 0.12 says this of every kernel; see `flash`.
  "default:The Pallas Triton backend:DeprecationWarning"
)
@pytest.mark.parametrize("e", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("mask", [None, BlockCausal(780)])
def test_gradients_of_pallas(h100, e, dtype, mask):
  (device,) = h100.devices
  tiles = flash.tiles(device.device_kind, e, dtype)
  attend = functools.partial(flash.flash, mask=mask, tiles=tiles)
  text = _gradients(device, 7800, 7800, attend, dtype, e)
  for name in ("forward", "of_queries", "of_keys"):
    assert f"attention_{name}" in text


def test_kernels_of_pallas_fit_an_sm_90a(h100, tmp_path):
  """As ptxas assembles them. Tests compile with less effort: a program."""
  path = tmp_path / "plan.json"
  flags = ("--attention=7800", "--target=h100", f"--json={path}")
  subprocess.run(
    [sys.executable, "-m", "launch.plan", *flags],
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    check=True,
  )
  rows = json.loads(path.read_text())
  (row,) = [
    row
    for row in rows
    if row["implementation"] == "pallas" and row["mask"] and row["backward"]
  ]
  assert {*row["kernels"]} == {
    f"attention_{name}" for name in ("forward", "of_queries", "of_keys")
  }
  for kernel in row["kernels"].values():
    assert 0 < kernel["shared"] <= h100.chip.shared_per_block
    # XLA of jax 0.12 writes no assembly to look at.
    if jax.__version_info__ < (0, 12):
      assert 0 < kernel["registers"] <= 255
      assert kernel["spilled"] <= 8  # Bytes of a thread.
