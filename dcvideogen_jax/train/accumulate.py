"""Gradients of a batch in parts, so that a large batch fits into memory."""

from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import sharding, tree
from dcvideogen_jax.train import task as task_lib


def cut(batch: task_lib.Batch, parts: int) -> task_lib.Batch:
  """Arrays (b, ...) to (parts, b / parts, ...), split over the mesh alike.

  Part i gets the samples i, i + parts, ...: each device cuts what it has.
  """

  def one(x):
    x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
    return sharding.constrain(x, None, "batch")

  return jax.tree.map(one, batch)


def join(batch: task_lib.Batch) -> task_lib.Batch:
  """Undoes `cut`."""

  def one(x):
    x = jnp.moveaxis(x, 0, 1)
    return sharding.constrain(x.reshape(-1, *x.shape[2:]), "batch")

  return jax.tree.map(one, batch)


def encode(
  task: task_lib.Task, variables: Any, batch: task_lib.Batch, parts: int
) -> task_lib.Batch:
  """`task.encode` of a batch, one part at a time."""
  if parts == 1:
    return task.encode(variables, batch)
  return join(
    jax.lax.map(lambda part: task.encode(variables, part), cut(batch, parts))
  )


def gradients(
  task: task_lib.Task,
  trainable: Any,
  frozen: Any,
  drawn: task_lib.Batch,
  parts: int,
) -> tuple[task_lib.Metrics, Any]:
  """Loss, metrics and gradients: float32 means over the parts of a batch.

  Args:
    task: gives the loss.
    trainable: what gradients are for.
    frozen: the other variables.
    drawn: the whole batch, each array (b, ...).
    parts: how many pieces `b` is cut into.

  Returns:
    ({"loss": ..., **metrics}, a tree like `trainable`).
  """

  def loss_fn(trainable, part):
    return task.loss_fn(tree.merge(trainable, frozen), part)

  def once(part):
    both = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), grads = both(trainable, part)
    return jax.tree.map(
      lambda x: x.astype(jnp.float32), ({"loss": loss, **metrics}, grads)
    )

  if parts == 1:
    return once(drawn)
  pieces = cut(drawn, parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(once, jax.tree.map(lambda x: x[0], pieces)),
  )
  total, _ = jax.lax.scan(
    lambda total, part: (jax.tree.map(jnp.add, total, once(part)), None),
    zeros,
    pieces,
  )
  return jax.tree.map(lambda x: x / parts, total)
