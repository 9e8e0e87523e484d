"""Kernels in eight bits: rounding, products, gradients and compiled memory."""

import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import tree
from dcvideogen_jax.models import eight_bits, layers, umt5, wan_dit
from tests import random_weights

FORMATS = [*eight_bits.FORMATS]
LARGEST = {"int8": 127, "float8": 448}


def _kernel(channels=48, features=40):
  kernel = np.random.default_rng(0).normal(size=(channels, features))
  kernel *= np.geomspace(1e-3, 1e3, features)
  return kernel.astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_is_the_nearest(name):
  kernel = _kernel()
  stored, scale = eight_bits.quantise(kernel, name)
  assert stored.dtype == eight_bits.FORMATS[name]
  assert scale.shape == (40,) and scale.dtype == np.float32
  numbers = np.arange(256, dtype=np.uint8).view(stored.dtype)
  numbers = np.unique(numbers.astype(np.float64))
  numbers = numbers[np.abs(numbers) <= LARGEST[name]]
  found = np.abs(stored.astype(np.float64) * scale - kernel)
  choices = np.abs(numbers * scale[:, None] - kernel[..., None])
  # The quotient is rounded to float32 before it is rounded to eight bits.
  np.testing.assert_allclose(found, choices.min(-1), atol=1e-6 * scale.max())
  np.testing.assert_array_equal(
    np.abs(stored.astype(np.float64)).max(0), LARGEST[name]
  )


@pytest.mark.parametrize("name", FORMATS)
def test_numpy_and_jax_round_alike(name):
  kernel = _kernel()
  for x, y in zip(
    eight_bits.quantise(kernel, name),
    eight_bits.quantise(jnp.asarray(kernel), name),
    strict=True,
  ):
    np.testing.assert_array_equal(
      x.view(np.uint8), np.asarray(y).view(np.uint8)
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_a_channel_of_zeros_stays_zero(name, value):
  kernel = _kernel()
  kernel[:, 3] = value
  stored, scale = eight_bits.quantise(kernel, name)
  assert not stored[:, 3].any() and scale[3] == 1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_is_that_of_the_stored_kernel(name, dtype):
  x = np.random.default_rng(1).normal(size=(2, 5, 48))
  x = jnp.asarray(x, dtype)
  stored, scale = eight_bits.quantise(_kernel(), name)
  bias = np.linspace(-1, 1, 40, dtype=np.float32)
  found = eight_bits.linear(x, jnp.asarray(stored), jnp.asarray(scale), bias)
  assert found.dtype == dtype
  kernel = stored.astype(np.float64) * scale
  product = np.asarray(x, np.float64) @ kernel
  expected = product + bias
  # The product is rounded before the bias, which may cancel it, is added.
  size = np.abs(product).max((0, 1)) + np.abs(bias)
  # Two roundings to bfloat16, each by up to 2^-8 of the number.
  unit = 2.0**-7 if dtype == jnp.bfloat16 else 2.0**-20
  error = np.abs(np.asarray(found, np.float64) - expected).max((0, 1))
  assert (error <= 1.01 * unit * size).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_gradient_passes_through_to_the_input_alone(name):
  stored, scale = map(jnp.asarray, eight_bits.quantise(_kernel(), name))
  x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 48)), jnp.float32)
  dy = jnp.asarray(np.random.default_rng(2).normal(size=(5, 40)), jnp.float32)

  def loss(x, scale):
    return (eight_bits.linear(x, stored, scale) * dy).sum()

  dx, dscale = jax.grad(loss, (0, 1))(x, scale)
  kernel = np.asarray(stored, np.float64) * np.asarray(scale)
  np.testing.assert_allclose(dx, dy @ kernel.T, rtol=1e-4, atol=1e-2)
  assert not dscale.any()


@pytest.mark.parametrize("train", [False, True])
def test_no_wider_copy_of_the_stack_stands_in_the_program(train):
  n, width = 6, 128
  stack = {
    "kernel": jax.ShapeDtypeStruct((n, width, width), jnp.int8),
    "scale": jax.ShapeDtypeStruct((n, width), jnp.float32),
  }
  x = jax.ShapeDtypeStruct((4, width), jnp.bfloat16)

  def forward(x, stack):
    def body(x, layer):
      y = eight_bits.linear(x, layer["kernel"], layer["scale"])
      return jnp.tanh(y), None

    return jax.lax.scan(body, x, stack)[0].astype(jnp.float32).sum()

  function = jax.grad(forward) if train else forward
  text = jax.jit(function).lower(x, stack).compile().as_text()
  assert re.search(rf"s8\[{n},{width},{width}\]", text)
  assert not re.search(rf"f(16|32)\[{n},{width},{width}\]", text)


WAN = {
  "layers": 2,
  "width": 24,
  "heads": 2,
  "ffn_width": 32,
  "in_channels": 4,
  "out_channels": 4,
  "text_width": 8,
  "frequencies": 16,
}
UMT5 = {
  "vocab": 20,
  "layers": 2,
  "width": 16,
  "heads": 2,
  "head_width": 8,
  "ffn_width": 24,
}


def _inputs(build):
  if build is wan_dit.build:
    random = np.random.default_rng(3)
    shapes = (1, 1, 4, 4, 4), (1,), (1, 3, 8)
    return [jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes]
  return [jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)]


def _rounded(variables, name):
  """Rounds the kernels of blocks; returns them stored, and multiplied out."""
  stored, plain = tree.flatten(variables), tree.flatten(variables)
  for path, kernel in tree.flatten(variables).items():
    if "/blocks/" in path and path.endswith("/kernel"):
      numbers, scale = eight_bits.quantise(np.asarray(kernel), name, axis=1)
      stored[path] = jnp.asarray(numbers)
      stored[path.removesuffix("kernel") + "scale"] = jnp.asarray(scale)
      plain[path] = jnp.asarray(numbers.astype(np.float32) * scale[:, None])
  return (
    flax.traverse_util.unflatten_dict(leaves, sep="/")
    for leaves in (stored, plain)
  )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
  ("build", "fields"), [(wan_dit.build, WAN), (umt5.build, UMT5)]
)
def test_models_compute_with_their_rounded_kernels(build, fields, name):
  inputs = _inputs(build)
  exact, module = build(fields), build(fields, weights=name)
  stored, plain = _rounded(random_weights.of(exact, *inputs), name)
  # Only the blocks are in eight bits: embeddings and the head are not.
  expected = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  types = [
    {n: (x.shape, x.dtype) for n, x in tree.flatten(variables).items()}
    for variables in (stored, expected)
  ]
  assert types[0] == types[1]
  found = random_weights.jitted(module)(stored, *inputs)
  expected = random_weights.jitted(exact)(plain, *inputs)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  unrounded = random_weights.of(exact, *inputs)
  other = random_weights.jitted(exact)(unrounded, *inputs)
  assert np.abs(other - expected).max() > 1e-3


def test_low_rank_updates_are_added_to_the_rounded_kernel():
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16)), jnp.float32)
  module = layers.Dense(8, lora_rank=2, lora_alpha=4.0, weights="int8")
  variables = jax.jit(module.init)(jax.random.key(0), x)
  scale = variables["params"]["scale"]
  assert scale.dtype == jnp.float32 and (scale > 0).all()
  plain = layers.Dense(8, weights="int8").apply(
    {"params": variables["params"]}, x
  )
  np.testing.assert_array_equal(module.apply(variables, x), plain)
  lora = jax.tree.map(jnp.ones_like, variables["lora"])
  found = module.apply({**variables, "lora": lora}, x)
  update = 2.0 * x.sum(-1, keepdims=True) * 2
  np.testing.assert_allclose(found, plain + update, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("build", [wan_dit.build, umt5.build])
@pytest.mark.parametrize("wrong", ["int4", 8, ["int8"]])
def test_unknown_formats_are_refused(build, wrong):
  fields = WAN if build is wan_dit.build else UMT5
  with pytest.raises(ValueError, match="weights must be None or one of int8"):
    build(fields, weights=wrong)
