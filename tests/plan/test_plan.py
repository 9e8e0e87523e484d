"""Work is counted right, and so is what a plan redoes."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from dcvideogen_jax import errors
from dcvideogen_jax.models import bands, dc_ae_v, streaming
from dcvideogen_jax.ops import attention, conv3d
from dcvideogen_jax.plan import flops, hardware
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


def test_counts_cudnns_attention(monkeypatch):
  # Tracing asks for the library's version, although nothing is run.
  cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
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
  assert counted == [2 * 2 * 2 * 3 * 7 * 64 * 16] * 2


def test_usable_memory_and_roofline():
  h100 = hardware.GPUS["h100"]
  assert h100.usable / 2**30 == pytest.approx(72.8, abs=0.05)
  peak, bandwidth = h100.flops["bfloat16"], h100.bandwidth
  assert h100.roofline(3 * peak, 2 * bandwidth, "bfloat16") == 3
  assert h100.roofline(3 * peak, 4 * bandwidth, "bfloat16") == 4
  assert h100.roofline(3 * peak, 0, "float32") == 6


def test_one_sentence_without_cuda(monkeypatch):
  def fail(**_):
    raise RuntimeError("Unknown backend cuda\nand more")

  monkeypatch.setattr(topologies, "get_topology_desc", fail)
  with pytest.raises(errors.UserError, match="requirements-cuda.txt") as e:
    hardware.gpu("h100")
  assert "Unknown backend cuda" in str(e.value) and "\n" not in str(e.value)
  with pytest.raises(errors.UserError, match="unknown target 'b300'"):
    hardware.gpu("b300")


def _traced(module, method, x, *args, collections, **static):
  variables = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 8, 3))
  )
  state = jax.eval_shape(
    lambda v, x: streaming.empty_state(
      module, method, v, x, *args, collections=collections, **static
    ),
    variables,
    x,
  )
  traced = streaming.apply.trace(
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
