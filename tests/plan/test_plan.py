"""FLOPs are counted right, and so are those that bands compute twice."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, flops, sharding
from dcvideogen_jax.models import bands, calls, dc_ae_v
from dcvideogen_jax.ops import attention, conv3d
from dcvideogen_jax.ops.attention import splash
from dcvideogen_jax.plan import hardware
from tests import golden_data


def test_counts_convolutions_products_and_scans():
  def f(x, kernel, matrix):
    y = conv3d.conv3d(
      x, kernel, padding=((1, 1), (1, 1), (1, 1)), implementation="xla"
    )
    return jax.lax.scan(lambda c, _: (c @ matrix, None), y, None, length=3)[0]

  shapes = [(1, 4, 5, 6, 7), (3, 3, 3, 7, 8), (8, 8)]
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  positions = 4 * 5 * 6
  expected = 2 * positions * (27 * 7 * 8 + 3 * 8 * 8)
  assert flops.count(jax.jit(f).trace(*args).jaxpr.jaxpr) == expected


def test_counts_the_default_of_several_platforms():
  x = jax.ShapeDtypeStruct((8, 8), jnp.float32)

  def f(x):
    return jax.lax.platform_dependent(
      x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x
    )

  assert flops.count(jax.jit(f).trace(x).jaxpr.jaxpr) == 2 * 8**3


def test_counts_no_zeros_of_a_strided_convolutions_gradient():
  def f(x, kernel):
    return jax.lax.conv(x, kernel, (2, 2), "VALID").sum()

  x, kernel = (
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((1, 3, 8, 8), (5, 3, 2, 2))
  )
  forward, both = (
    flops.count(jax.jit(g).trace(x, kernel).jaxpr.jaxpr)
    for g in (f, jax.value_and_grad(f))
  )
  # Each number of the input takes part in one window.
  assert [forward, both] == [2 * 5 * 3 * 8**2, 2 * forward]


def test_counts_cudnns_attention(monkeypatch):
  # Tracing asks for cuDNN's version, although nothing runs.
  cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  # Odd lengths are padded for cuDNN, and padding is computed too.
  q = jax.ShapeDtypeStruct((2, 7, 3, 16), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((2, 64, 3, 16), jnp.bfloat16)
  counted = [
    flops.count(
      jax.jit(functools.partial(attention.attention, implementation=name))
      .trace(q, k, k)
      .jaxpr.jaxpr
    )
    for name in ("cudnn", "reference")
  ]
  assert counted == [2 * 2 * 2 * 3 * n * 64 * 16 for n in (8, 7)]


def test_counts_kernels_once_per_block():
  blocks = splash.Blocks(256, 128, 128, 128, 128)
  attend = functools.partial(splash.splash, blocks=blocks)
  q = jax.ShapeDtypeStruct((2, 512, 3, 128), jnp.bfloat16)
  jaxpr = jax.jit(attend).trace(q, q, q).jaxpr.jaxpr
  products = 2 * 2 * 2 * 3 * 512 * 512 * 128
  assert flops.count(jaxpr) == products
  assert flops.count(jaxpr, kernels_only=True) == products

  def f(x, q):
    return attend(q, q, q), x @ x

  x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  jaxpr = jax.jit(f).trace(x, q).jaxpr.jaxpr
  assert flops.count(jaxpr) == products + 2 * 8**3
  assert flops.count(jaxpr, kernels_only=True) == products


def test_counts_what_all_devices_do():
  mesh = sharding.make_mesh({"data": 4, "tensor": 2})

  def f(x, w):
    def part(x, w):
      return jax.lax.psum(x @ w, "tensor")

    specs = P("data", "tensor"), P("tensor")
    return jax.shard_map(part, in_specs=specs, out_specs=P("data"))(x, w)

  x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 6), (6, 5)))
  with jax.set_mesh(mesh):
    jaxpr = jax.jit(f).trace(x, w).jaxpr.jaxpr
  assert flops.count(jaxpr) == 2 * 8 * 6 * 5


def test_usable_memory():
  h100 = hardware.GPUS["h100"]
  assert h100.usable / 2**30 == pytest.approx(72.8, abs=0.05)


def test_one_sentence_without_cuda(monkeypatch):
  def fail(**_):
    raise RuntimeError("Unknown backend cuda\nand more")

  monkeypatch.setattr(topologies, "get_topology_desc", fail)
  with pytest.raises(errors.UserError, match="requirements-cuda.txt") as e:
    hardware.find("h100")
  assert "Unknown backend cuda" in str(e.value) and "\n" not in str(e.value)
  with pytest.raises(errors.UserError, match="unknown target 'b300'"):
    hardware.find("b300")


def _traced(module, method, x, *args, collections, **static):
  variables = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 8, 3))
  )
  state = jax.eval_shape(
    lambda v, x: calls.empty_state(
      module, method, v, x, *args, collections=collections, **static
    ),
    variables,
    x,
  )
  traced = calls.apply.trace(
    module, method, variables, x, *args, state=state, **static
  )
  return flops.count(traced.jaxpr.jaxpr), traced.out_info[0]


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_planned_work_is_that_of_the_programs(cut):
  module = dc_ae_v.build(golden_data.SMALL, conv3d="xla")
  height, width = 64, 32
  latents = jax.ShapeDtypeStruct((1, 2, 8, 4, 4), jnp.float32)
  whole, _ = _traced(module, "decode", latents, collections=("cache",))
  assert whole == bands.work(module, height, width, decode=True)

  candidates = bands._candidates(module, height, width, True, True)
  plan = next(c for c in candidates if c.cut == cut and c.rows > 1)
  coarse, features = _traced(
    module, "decode_coarse", latents, collections=("cache",), cut=cut
  )
  b, t, h, w, c = features.shape
  padded = (b, t, -(-h // plan.rows) * plan.rows, w, c)
  fine, _ = _traced(
    module,
    "decode_fine",
    jax.ShapeDtypeStruct(padded, jnp.float32),
    0,
    collections=("cache", "rows"),
    cut=cut,
    rows=plan.rows,
    height=height,
  )
  total = coarse + fine * bands.count(module, plan, height, decode=True)
  assert total / whole == pytest.approx(plan.work, rel=1e-6)
