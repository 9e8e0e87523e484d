"""Every moment is counted once, whatever happens inside it."""

import time

import jax
import jax.numpy as jnp
import pytest

from dcvideogen_jax import clock as clock_lib


def slow_items():
  for i in range(3):
    time.sleep(0.03)
    yield i


def test_phases_add_up_to_the_time_that_passed():
  start = time.perf_counter()
  clock = clock_lib.Clock()
  with clock.phase("outer"):
    for _ in clock.over("items", slow_items()):
      time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), clock.phase("failing"):
      time.sleep(0.02)
      raise ZeroDivisionError
    # Large enough that compiling it cannot go unnoticed.
    x = jnp.arange(7.0)
    jax.jit(lambda x: [jnp.sort(jnp.sin(i * x)) for i in range(30)])(x)
  seconds = clock.report()
  passed = time.perf_counter() - start
  assert seconds["total"] == pytest.approx(passed, abs=0.01)
  assert seconds["items"] >= 0.09
  assert seconds["failing"] >= 0.02
  assert seconds["compile"] > 0.05
  parts = {name: s for name, s in seconds.items() if name != "total"}
  assert sum(parts.values()) == pytest.approx(seconds["total"], abs=0.01)
  assert 0.03 <= parts["outer"] < passed - 0.15
  assert min(parts.values()) >= 0
