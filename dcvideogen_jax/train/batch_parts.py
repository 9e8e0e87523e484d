"""Cuts batches into parts and joins them, without traffic between devices."""

from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import sharding


def cut(batch: Any, parts: int) -> Any:
  """Cuts arrays (b, ...) into (parts, b / parts, ...), sharded over samples.

  Part i gets the samples i, i + parts, ..., so that each device cuts the
  samples that it holds already.
  """

  def one(x):
    x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
    return sharding.constrain(x, None, "batch")

  return jax.tree.map(one, batch)


def join(parts: Any) -> Any:
  """Joins what `cut` returns: (parts, b / parts, ...) to (b, ...)."""

  def one(x):
    x = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
    return sharding.constrain(x, "batch")

  return jax.tree.map(one, parts)
