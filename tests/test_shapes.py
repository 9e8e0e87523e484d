"""The shapes that signatures promise are checked in every call."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from dcvideogen_jax.models import dc_ae_v, rope
from tests import golden_data

X = np.zeros((2, 6, 3, 8), np.float32)


@pytest.mark.parametrize(
  ("x", "angles"),
  [
    (X, np.zeros((5, 4), np.float32)),  # Not as many tokens.
    (X[0], np.zeros((3, 4), np.float32)),  # No batch.
    (X, np.zeros((6, 4), np.int32)),  # Not a float.
  ],
)
def test_wrong_arguments(x, angles):
  with pytest.raises(jaxtyping.TypeCheckError):
    rope.rotate(x, angles)
  with pytest.raises(jaxtyping.TypeCheckError):
    jax.eval_shape(rope.rotate, x, angles)


def test_right_arguments():
  rope.rotate(X, jnp.zeros((6, 4)))


def test_models_are_checked():
  module = dc_ae_v.build(golden_data.SMALL)
  grey = np.zeros((1, 8, 8, 8, 1), np.float32)
  with pytest.raises(jaxtyping.TypeCheckError, match="video"):
    jax.eval_shape(module.init, jax.random.key(0), grey)


def test_a_check_may_be_off(wrong_shapes):
  with pytest.raises(TypeError):  # jax's own.
    rope.rotate(X, np.zeros((5, 4), np.float32))
