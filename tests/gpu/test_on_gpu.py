"""Kernels and small models on a GPU; `make gpu` runs these tests there.

They run without the settings of `conftest`: as programs do. What is compared
with the CPU has exact products in float32 on both.

DCVIDEOGEN_GPU_TESTS=cpu takes the CPU for the GPU, to try the tests themselves.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import cases, decoding, kernels, programs
from dcvideogen_jax.models import bands, dc_ae_v, streaming, wan_dit

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu():
  device = jax.devices(os.environ.get("DCVIDEOGEN_GPU_TESTS", "gpu"))[0]
  with jax.default_device(device):
    yield device


def _on_both(gpu, function, *arguments):
  """Results on the GPU and on the CPU, float32 with exact products."""
  found = []
  for device in (gpu, jax.devices("cpu")[0]):
    with jax.default_device(device), jax.default_matmul_precision("highest"):
      moved = jax.device_put(arguments, device)
      # A new function: programs are not shared between the devices.
      found.append(jax.jit(lambda *x: function(*x))(*moved))
  return jax.device_get(found)


def _close(pair, bound):
  def close(a, b):
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= bound * np.abs(b).max()

  jax.tree.map(close, *pair)


@pytest.mark.filterwarnings(
  "default:The Pallas Triton backend:DeprecationWarning"
)
@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda k: k.name)
def test_attention(gpu, kernel):
  if not kernels.supported(kernel, gpu.platform):
    pytest.skip("cuDNN is for GPUs")
  found = kernels.errors(kernel)
  assert max(found.values()) <= kernels.BOUNDS[kernel.dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_convolutions(gpu, dtype):
  found = kernels.conv3d_errors(dtype)
  assert max(found.values()) <= kernels.BOUNDS[dtype]


def _autoencoder():
  module = dc_ae_v.build(decoding.SMALL)
  video = jax.ShapeDtypeStruct((1, 8, 16, 24, 3), jnp.float32)
  return module, jax.eval_shape(module.init, jax.random.key(0), video), video


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_the_autoencoder_is_that_of_a_cpu(gpu, method):
  module, shapes, video = _autoencoder()
  latents = jax.ShapeDtypeStruct((1, 2, 2, 3, 4), jnp.float32)
  x = video if method == "encode" else latents
  function = functools.partial(module.apply, method=method)
  pair = _on_both(gpu, function, *cases.draw((shapes, x)))
  _close(pair, 1e-4)


def test_bands_are_the_whole_frame(gpu):
  module, shapes, _ = _autoencoder()
  variables = cases.draw(shapes)
  latents = np.random.default_rng(0).normal(size=(1, 4, 6, 3, 4))
  latents = latents.astype(np.float32)
  whole, banded = (
    np.concatenate(
      [*streaming.decode(module, variables, [latents], plan=plan)], axis=1
    )
    for plan in (streaming.WHOLE, bands.BandPlan(cut=2, rows=4))
  )
  _close((banded, whole), 1e-4)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_the_transformer_is_that_of_a_cpu(gpu, weights):
  module = wan_dit.build(programs.SMALL, weights=weights)
  inputs = (
    jax.ShapeDtypeStruct((1, 2, 3, 5, 32), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.float32),
    jax.ShapeDtypeStruct((1, 8, 16), jnp.float32),
  )
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  pair = _on_both(gpu, module.apply, *cases.draw((shapes, *inputs)))
  _close(pair, 1e-4)


def test_a_training_step_is_that_of_a_cpu(gpu):
  module = wan_dit.build(
    programs.SMALL, lora_rank=4, lora_alpha=8.0, remat="full"
  )
  x = jax.ShapeDtypeStruct((1, 2, 3, 5, 32), jnp.float32)
  time = jax.ShapeDtypeStruct((1,), jnp.float32)
  text = jax.ShapeDtypeStruct((1, 8, 16), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, time, text)
  step, state = programs.training_step(module, shapes)
  run = functools.partial(_metrics, step)
  _close(_on_both(gpu, run, *cases.draw((state, x, text))), 1e-4)


def _metrics(step, *arguments):
  return step(*arguments)[1]
