"""Autoencoders whose columns are split over devices equal one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import sharding
from dcvideogen_jax.models import bands, calls, dc_ae_v, streaming, wan_vae
from tests import random_weights

# Share of the largest value by which two orders of the same sums may differ.
EXACT = 1e-5
DEEP = {
  "latent_channels": 4,
  "widths": (8, 8, 8, 8),
  "depths": (0, 1, 1, 1),
  "chunk_frames": 4,
  "spatial_factor": 4,
  "temporal_factor": 2,
}
WAN = {
  "latent_channels": 4,
  "base_width": 4,
  "multipliers": (1, 2, 2),
  "blocks": 1,
  "temporal": (True, True),
  "mean": (0.0,) * 4,
  "std": (1.0,) * 4,
}


@functools.cache
def small(kind="deep"):
  """A random model; norms and biases are random too."""
  build = {"deep": dc_ae_v.build, "wan": wan_vae.build}[kind]
  module = build(DEEP if kind == "deep" else WAN)
  example = jax.ShapeDtypeStruct((1, 5, 4, 4, 3), np.float32)
  return module, random_weights.of(module, example, norms=1.0)


def video(*shape):
  x = np.random.default_rng(shape[3]).uniform(-1, 1, (*shape, 3))
  return x.astype(np.float32)


@functools.cache
def alone(frames, height, latents, clips=1):
  """Computes the references on one device.

  Returns:
    A video, its latents, the decoded video, and the bytes that decoding needs.
  """
  module, variables = small()
  x = video(clips, frames, height, 4 * latents)
  one = sharding.make_mesh({}, jax.devices()[:1])
  encode, decode = (
    functools.partial(module.apply, method=m) for m in ("encode", "decode")
  )
  z, _ = run(encode, one, variables, x)
  y, program = run(decode, one, variables, z)
  return x, z, y, program.memory_analysis().temp_size_in_bytes


def mesh_of(**axes):
  count = int(np.prod([*axes.values()]))
  return sharding.make_mesh(axes, jax.devices()[:count])


def run(function, mesh, variables, x):
  """Returns the result in host memory, and the compiled program.

  Weights are replicated and clips are sharded, as in training.
  """
  with jax.set_mesh(mesh):
    where = (NamedSharding(mesh, P()), NamedSharding(mesh, sharding.BATCH))
    # A new function each time: jit caches traces regardless of the mesh.
    program = jax.jit(lambda v, x: function(v, x), in_shardings=where)
    program = program.lower(variables, x).compile()
    return jax.device_get(program(*jax.device_put((variables, x), where))), (
      program
    )


def assert_same(found, expected):
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    largest = max(1, np.abs(b).max())
    np.testing.assert_allclose(a, b, rtol=0, atol=EXACT * largest)


def gathered(program):
  """Returns the shapes of all-gathers and all-to-alls in a program."""
  found = re.findall(
    r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all)\(", program.as_text()
  )
  return [tuple(map(int, s.split(","))) for s in found]


def permutes(program):
  return len(re.findall(r" collective-permute(?:-start)?\(", program.as_text()))


# 22 columns of latents are those of 704 pixels at a spatial factor of 32.
@pytest.mark.parametrize(
  ("axes", "latents", "implementation"),
  [
    ({"spatial": 8}, 8, "xla"),
    ({"spatial": 8}, 22, "xla"),
    ({"data": 2, "spatial": 4}, 22, None),
    ({"fsdp": 2, "spatial": 2}, 3, "winograd"),
  ],
)
def test_encoding_and_decoding(axes, latents, implementation):
  module, variables = small()
  module = module.clone(conv3d=implementation)
  mesh = mesh_of(**axes)
  x, z, y, needed = alone(8, 8, latents, 2)
  for method, given, expected in (("encode", x, z), ("decode", z, y)):
    function = functools.partial(module.apply, method=method)
    found, program = run(function, mesh, variables, given)
    assert_same(found, expected)
    # Only latents whose columns the devices do not divide are gathered.
    uneven = method == "encode" and latents % mesh.shape["spatial"]
    assert {s[-1] for s in gathered(program)} == ({4} if uneven else set())
    assert permutes(program)
  if latents == 8:
    assert program.memory_analysis().temp_size_in_bytes < needed / 3


def test_gradients():
  module, variables = small()
  module = module.clone(conv3d="xla", remat=True)

  def loss(variables, x):
    return jnp.abs(module.apply(variables, x) - x).mean()

  x = video(2, 4, 8, 4 * 11)
  function = jax.value_and_grad(loss)
  expected, _ = run(function, mesh_of(data=1), variables, x)
  found, program = run(function, mesh_of(data=2, spatial=4), variables, x)
  np.testing.assert_allclose(found[0], expected[0], rtol=EXACT)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=EXACT * np.abs(b).max())
  assert not gathered(program)


@pytest.mark.parametrize(
  ("latents", "plan"),
  [
    (3, streaming.WHOLE),
    (11, bands.BandPlan(cut=2, rows=2, offload=True)),
  ],
)
def test_streams(latents, plan):
  module, variables = small()
  x, z, y, _ = alone(10, 16, latents)
  mesh = mesh_of(spatial=4)
  variables = jax.device_put(variables, NamedSharding(mesh, P()))
  before = calls.apply._cache_size()
  with jax.set_mesh(mesh):
    found = [*streaming.encode(module, variables, [x], plan=plan)]
    assert_same(np.concatenate(found, axis=1), z)
    found = [*streaming.decode(module, variables, [z], plan=plan)]
    assert_same(np.concatenate(found, axis=1), y)
  # The same programs serve all chunks and all bands.
  programs = 2 if plan.cut is None else 4
  assert calls.apply._cache_size() - before == programs


def test_wan():
  """Only the attention layers, at the size of latents, gather whole frames."""
  module, variables = small("wan")
  mesh, one, latents = mesh_of(spatial=4), mesh_of(data=1), 7
  x = video(1, 5, 16, 4 * latents)
  encode = functools.partial(module.apply, method="encode")
  expected, _ = run(encode, one, variables, x)
  found, _ = run(encode, mesh, variables, x)
  assert_same(found, expected)

  decode = functools.partial(module.apply, method="decode")
  y, _ = run(decode, one, variables, expected.mean)
  found, program = run(decode, mesh, variables, expected.mean)
  assert_same(found, y)
  # Queries, keys and values of all latent frames.
  assert max(np.prod(s) for s in gathered(program)) <= 2 * 4 * 8 * 3 * 8
  with jax.set_mesh(mesh):
    variables = jax.device_put(variables, NamedSharding(mesh, P()))
    found = [*wan_vae.stream_decode(module, variables, [expected.mean])]
  assert_same(np.concatenate(found, axis=1), y)
