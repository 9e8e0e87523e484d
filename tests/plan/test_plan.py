"""Work is counted right, and so is what a plan redoes."""

import jax
import jax.numpy as jnp
import pytest

from dcvideogen_jax.models import bands, dc_ae_v, streaming
from dcvideogen_jax.ops import conv3d
from dcvideogen_jax.plan import flops
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
