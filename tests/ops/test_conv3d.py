"""Every implementation of conv3d against the reference, with gradients."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax.ops import conv3d
from dcvideogen_jax.ops.conv3d import measured, winograd

FORMS = [name for name in conv3d.IMPLEMENTATIONS if name != "reference"]
SAME = ((1, 1),) * 3

# By name: shape of x, features, taps, padding. The paddings are those of the
# temporal designs and of bands of rows; sizes are odd and even.
CASES = {
  "same": ((2, 5, 7, 6, 5), 4, (3, 3, 3), SAME),
  "causal": ((1, 6, 3, 5, 4), 6, (3, 3, 3), ((0, 0), (1, 1), (1, 1))),
  "rows": ((1, 4, 6, 5, 4), 3, (3, 3, 3), ((0, 1), (0, 0), (1, 1))),
  "wide": ((1, 2, 3, 4, 2), 3, (3, 3, 3), ((4, 2), (3, 0), (0, 5))),
  "one": ((3, 1, 1, 1, 4), 4, (3, 3, 3), SAME),
  "point": ((1, 3, 4, 4, 3), 5, (1, 1, 1), ((0, 0),) * 3),
  "uneven": ((1, 4, 5, 6, 3), 4, (2, 3, 5), ((1, 0), (0, 2), (2, 2))),
}


def _inputs(shape, features, taps, dtype=jnp.float32):
  rng = np.random.default_rng(sum(shape) + features)
  x = rng.standard_normal(shape)
  kernel = rng.standard_normal((*taps, shape[-1], features))
  kernel /= np.sqrt(kernel[..., 0].size)
  bias = rng.standard_normal(features)
  return tuple(jnp.asarray(a, dtype) for a in (x, kernel, bias))


_conv3d = functools.partial(
  jax.jit, static_argnames=("padding", "implementation")
)(conv3d.conv3d)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _value_and_gradients(name, padding, max_elements, *args):
  def run(*args):
    return conv3d.conv3d(
      *args,
      padding=padding,
      implementation=name,
      max_elements=max_elements,
    )

  y, vjp = jax.vjp(run, *args)
  weights = np.random.default_rng(1).standard_normal(y.shape)
  return y, *vjp(jnp.asarray(weights, y.dtype))


def _assert_close(got, want, tolerance):
  for g, w in zip(got, want, strict=True):
    assert g.dtype == w.dtype
    g, w = (np.asarray(a, np.float64) for a in (g, w))
    np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * np.abs(w).max())


def _pairs():
  for form, (case, spec) in itertools.product(FORMS, CASES.items()):
    if form != "winograd" or spec[2] == (3, 3, 3):
      yield pytest.param(form, *spec, id=f"{form}-{case}")


@pytest.mark.parametrize(
  ("form", "shape", "features", "taps", "padding"), [*_pairs()]
)
def test_value_and_gradients(form, shape, features, taps, padding, monkeypatch):
  # Small enough for several bands even with these few positions.
  monkeypatch.setattr(winograd, "POSITIONS", 12)
  args = _inputs(shape, features, taps)
  want = _value_and_gradients("reference", padding, 2**31, *args)
  got = _value_and_gradients(form, padding, 2**31, *args)
  _assert_close(got, want, 2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_accumulated_in_float32(form):
  shape, features, taps, padding = CASES["same"]
  args = _inputs(shape, features, taps, jnp.bfloat16)
  wide = [a.astype(jnp.float32) for a in args[:2]]
  exact = _conv3d(*wide, padding=padding, implementation="reference")
  y = _conv3d(*args[:2], padding=padding, implementation=form)
  assert y.dtype == jnp.bfloat16
  # One rounding of the result: 8 bits of mantissa.
  np.testing.assert_allclose(
    y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5
  )
  got = _value_and_gradients(form, padding, 2**31, *args)
  assert all(g.dtype == jnp.bfloat16 for g in got)


@pytest.mark.parametrize("channels", [64, 512])
def test_winograd_rounds_little_more_than_the_direct_form(channels):
  x, kernel, _ = _inputs((1, 4, 6, 6, channels), 16, (3, 3, 3))
  x64, kernel64 = (np.asarray(a, np.float64) for a in (x, kernel))
  padded = np.pad(x64, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(
    padded, (3, 3, 3), axis=(1, 2, 3)
  )
  exact = np.einsum("nthwcijk,ijkco->nthwo", windows, kernel64)
  error = {
    name: np.sqrt(
      np.mean(
        (_conv3d(x, kernel, padding=SAME, implementation=name) - exact) ** 2
      )
    )
    for name in ("reference", "winograd")
  }
  assert error["winograd"] < 3 * error["reference"] < 3e-6


@pytest.mark.parametrize("case", ["same", "rows", "uneven"])
@pytest.mark.parametrize("rows", [1, 2])
def test_split_is_exact(case, rows):
  shape, features, taps, padding = CASES[case]
  # Small integers: every order of summation gives the same float32.
  x, kernel, bias = (
    np.round(4 * np.asarray(a)) for a in _inputs(shape, features, taps)
  )
  n, t, _, w, c = shape
  widest = n * (t + sum(padding[0])) * (w + sum(padding[2])) * max(c, features)
  limit = widest * (rows + taps[1] - 1)

  def run(x, limit):
    return conv3d.conv3d(
      x,
      kernel,
      bias,
      padding=padding,
      implementation="xla",
      max_elements=limit,
    )

  convolutions = [
    eqn
    for eqn in jax.make_jaxpr(run, static_argnums=1)(x, limit).eqns
    if eqn.primitive.name == "conv_general_dilated"
  ]
  assert len(convolutions) > 1
  for eqn in convolutions:
    for v in (eqn.invars[0], *eqn.outvars):
      assert v.aval.size <= limit

  @functools.partial(jax.jit, static_argnums=2)
  def value_and_gradient(x, dy, limit):
    y, vjp = jax.vjp(lambda x: run(x, limit), x)
    return y, *vjp(dy)

  y = jax.eval_shape(lambda x: run(x, limit), x)
  dy = np.round(4 * np.sin(np.arange(y.size))).reshape(y.shape)
  dy = dy.astype(np.float32)
  want = value_and_gradient(x, dy, 2**31)
  got = value_and_gradient(x, dy, limit)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_row_over_the_limit_is_refused():
  x, kernel, _ = _inputs(*CASES["same"][:3])
  with pytest.raises(NotImplementedError, match="more than 99 elements"):
    conv3d.conv3d(x, kernel, padding=SAME, max_elements=99)


def test_a_named_form_never_falls_back():
  shape, features, taps, padding = CASES["uneven"]
  x, kernel, _ = _inputs(shape, features, taps)
  with pytest.raises(NotImplementedError) as error:
    conv3d.conv3d(
      x, kernel, padding=padding, implementation="winograd", max_elements=9
    )
  assert "must be 3x3x3, found (2, 3, 5)" in str(error.value)
  assert "more than 9 elements" in str(error.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"implementation": "cudnn"}, "found 'cudnn'"),
    ({"padding": SAME[:2]}, "three pairs"),
    ({"x": jnp.zeros((1, 2, 3, 4, 3))}, "the same c"),
    ({"x": jnp.zeros((2, 3, 4, 2))}, "must be n t h w c"),
    ({"padding": ((0, 0),) * 3}, "smaller than kernel"),
  ],
)
def test_bad_arguments(wrong_shapes, change, message):
  given = {
    "x": jnp.zeros((1, 2, 3, 4, 2)),
    "kernel": jnp.zeros((3, 3, 3, 2, 5)),
    "padding": SAME,
  }
  with pytest.raises(ValueError, match=message):
    conv3d.conv3d(**given | change)


MEASURED = [
  {"shape": [1, 8, 8, 8, 16, 16], "ms": {"xla": 9.0, "channels": 1.0}},
  {
    "shape": [1, 8, 64, 64, 256, 256],
    "ms": {"xla": 900.0, "channels": 500.0, "winograd": 300.0},
  },
]


@pytest.mark.parametrize(
  ("x", "kernel", "platform", "want"),
  [
    ((1, 8, 8, 8, 16), (3, 3, 3, 16, 16), "cpu", "channels"),
    ((2, 8, 32, 32, 128), (3, 3, 3, 128, 256), "cpu", "winograd"),
    # Winograd cannot compute these taps.
    ((2, 8, 32, 32, 128), (3, 3, 1, 128, 256), "cpu", "channels"),
    # The work is so small that the compile time decides.
    ((1, 2, 2, 2, 4), (3, 3, 3, 4, 4), "cpu", "xla"),
    ((2, 8, 32, 32, 128), (3, 3, 3, 128, 256), "tpu", "xla"),
    ((2, 8, 32, 32, 128), (3, 3, 3, 128, 256), "gpu", "xla"),
  ],
)
def test_choice_follows_the_nearest_measurement(
  x, kernel, platform, want, monkeypatch
):
  monkeypatch.setattr(measured, "table", lambda: {"cpu": MEASURED})
  assert conv3d.choose(x, kernel, SAME, platform) == want


@pytest.mark.parametrize(
  "row", measured.table()["cpu"], ids=lambda r: str(r["shape"])
)
def test_measured_shapes_get_their_fastest_form(row):
  *x, c, o = row["shape"]
  assert set(row["ms"]) <= set(FORMS)
  name = conv3d.choose((*x, c), (3, 3, 3, c, o), SAME, "cpu")
  assert row["ms"][name] <= min(row["ms"].values()) + 1.1


def _lowered_for(platform, form=None):
  x, kernel, _ = _inputs((1, 4, 8, 8, 3), 16, (3, 3, 3))

  def run(x, kernel):
    return conv3d.conv3d(x, kernel, padding=SAME, implementation=form)

  def loss(x, kernel):
    return jnp.sum(run(x, kernel) ** 2)

  traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, kernel)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def _convolutions(text):
  """Returns the operand shapes of every convolution, sorted."""
  return sorted(re.findall(r"stablehlo.convolution.*: \((.*)\) ->", text))


def test_the_choice_is_that_of_the_platform_lowered_for(monkeypatch):
  rows = [{"shape": [1, 4, 8, 8, 3, 16], "ms": {"xla": 9.0, "channels": 0.1}}]
  monkeypatch.setattr(measured, "table", lambda: {"cpu": rows})
  cpu, gpu = _lowered_for("cpu"), _lowered_for("cuda")
  assert _convolutions(cpu) == _convolutions(_lowered_for("cpu", "channels"))
  assert _convolutions(gpu) == _convolutions(_lowered_for("cuda", "xla"))
  assert len(_convolutions(cpu)) == len(_convolutions(gpu)) == 3


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_default_equals_the_choice(form, monkeypatch):
  rows = [{"shape": [1, 4, 8, 8, 3, 16], "ms": {form: 1.0}}]
  monkeypatch.setattr(measured, "table", lambda: {"cpu": rows})
  args = _inputs((1, 4, 8, 8, 3), 16, (3, 3, 3))
  want = _value_and_gradients(form, SAME, 2**31, *args)
  got = _value_and_gradients.__wrapped__(None, SAME, 2**31, *args)
  _assert_close(got, want, 1e-6)
