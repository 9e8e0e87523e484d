"""Ranks ways to split and to save memory, by arithmetic.

For steps that train transformers. Work and what the backward pass keeps are
read off the traced step, the state's bytes off its shardings, and what layers
exchange is counted by hand; only the room that a block works in is a guess.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dcvideogen_jax import errors, flops, sharding
from dcvideogen_jax.plan import hardware, training
from dcvideogen_jax.train import step

REMATS = ("full", "dots", None)
_PARTS = (1, 2, 4, 8)
_SIDES = (1, 2, 4, 8)
# Arrays as wide as the tokens and as the feed-forward's hidden features that a
# block holds at once on its way back, in float32: of compiled steps.
_WIDE, _HIDDEN = 16, 2


class Way(NamedTuple):
  """A way to run a step, and what arithmetic says of it.

  Attributes:
    mesh: sizes of the axes.
    remat: a key of `wan_dit.REMAT`, or None to compute nothing again.
    accumulate: micro-batches.
    bytes: the peak of one device.
    seconds: of a step.
  """

  mesh: Mapping[str, int]
  remat: str | None
  accumulate: int
  bytes: float
  seconds: float

  def change(self, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that runs a step this way."""
    model = {**config["model"], "remat": self.remat}
    mesh, parts = dict(self.mesh), self.accumulate
    return {**config, "mesh": mesh, "accumulate": parts, "model": model}


class _Traced(NamedTuple):
  """A step of all devices: FLOPs, and bytes that a scan keeps for later."""

  flops: int
  kept: int


def rank(config: Mapping[str, Any], target: hardware.Target) -> list[Way]:
  """Ways to run a step, those that fit first, then the fastest.

  Args:
    config: of a training; its batch and its clips stay.
    target: what it runs on.

  Raises:
    errors.UserError: if it trains no transformer, or nothing can split its
      batch over these devices.
  """
  config = training.planned(config)
  if config["task"] != "denoise":
    raise errors.UserError(
      f"suggestions are for the task denoise, found {config['task']!r}"
    )
  run = step.plan({**config, "mesh": {}}, target.devices[:1])
  rules = config["sharding"]
  traced = {remat: _trace(config, remat, target) for remat in REMATS}
  ways = []
  for sizes in _meshes(config, len(target.devices)):
    try:
      mesh = sharding.make_mesh(sizes, target.devices)
      state = _state((run.state, {"frozen": run.frozen}), mesh, rules)
      trained = _state({"params": run.state.params}, mesh, rules)
    except errors.UserError:  # Some leaf cannot be split like this.
      continue
    for remat, parts in itertools.product(REMATS, _PARTS):
      if config["batch_size"] % (sizes["fsdp"] * parts) == 0:
        kept = state + _held(config, mesh, parts, traced[remat], trained)
        seconds = _seconds(config, target, mesh, remat, parts, run, traced)
        ways.append(Way(sizes, remat, parts, kept, seconds))
  if not ways:
    raise errors.UserError(
      f"no mesh of {len(target.devices)} devices splits a batch of "
      f"{config['batch_size']} and {config['model']['heads']} heads"
    )
  room = target.chip.usable
  return sorted(ways, key=lambda way: (way.bytes > room, way.seconds))


def _meshes(config: Mapping[str, Any], devices: int) -> list[dict[str, int]]:
  heads = config["model"]["heads"]
  return [
    {"fsdp": devices // (t * c), "tensor": t, "context": c}
    for t, c in itertools.product(_SIDES, _SIDES)
    if devices % (t * c) == 0 and heads % (t * c) == 0
  ]


def _trace(config, remat: str | None, target: hardware.Target) -> _Traced:
  """The step as one device would run it."""
  model = {**config["model"], "remat": remat}
  one = {**config, "model": model, "mesh": {}, "accumulate": 1}
  run = step.plan(one, target.devices[:1])
  jaxpr = step.trace(run, one, training.batch(one)).jaxpr.jaxpr
  return _Traced(flops.count(jaxpr), _kept(jaxpr))


def _kept(jaxpr: Any) -> int:
  """The most bytes that a scan hands on of its steps."""
  most = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scan":
      # What is handed on has an axis of steps that it has not inside.
      (body,) = flops.inner(eqn.params)
      pairs = zip(eqn.outvars, body.outvars, strict=True)
      made = [x.aval for x, y in pairs if x.aval.ndim > y.aval.ndim]
      most = max(most, sum(x.size * x.dtype.itemsize for x in made))
    most = max([most, *map(_kept, flops.inner(eqn.params))])
  return most


def _state(tree: Any, mesh: Mesh, rules: Any) -> int:
  """Bytes of a tree of shapes on one device."""
  return sum(
    math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, where in zip(
      jax.tree.leaves(tree),
      jax.tree.leaves(sharding.shardings(tree, mesh, rules)),
      strict=True,
    )
  )


def _tokens(config: Mapping[str, Any], mesh: Mesh, parts: int) -> float:
  """Of a micro-batch, on one device."""
  b, *grid, _ = training.batch(config)[config["space"]].shape
  tokens = math.prod(grid) // math.prod(config["model"]["patch"])
  split = sharding.num_shards(mesh, "batch") * sharding.num_shards(
    mesh, "tokens"
  )
  return b * tokens / (split * parts)


def _held(
  config, mesh: Mesh, parts: int, traced: _Traced, gradients: float
) -> float:
  """Bytes of activations, and of gradients that micro-batches add up.

  Of what the backward pass keeps, "tensor" splits a part only; none counts.
  """
  model = config["model"]
  wide = _WIDE * model["width"]
  hidden = _HIDDEN * model["ffn_width"] / mesh.shape["tensor"]
  block = 4 * _tokens(config, mesh, parts) * (wide + hidden)
  split = sharding.num_shards(mesh, "batch") * sharding.num_shards(
    mesh, "tokens"
  )
  return traced.kept / (split * parts) + block + gradients


def _seconds(config, target, mesh, remat, parts, run, traced) -> float:
  """Of a step: work or gathering weights, and exchanging activations."""
  peak = target.chip.flops[config["dtype"]]
  work = traced[remat].flops / (mesh.size * peak)
  weights = sum(
    x.size * x.dtype.itemsize
    for x in jax.tree.leaves((run.state.params, run.frozen))
  )
  # Forward and backward, and gradients scattered.
  trained = sum(x.size * 4 for x in jax.tree.leaves(run.state.params))
  gathered = parts * (2 * weights + trained) / mesh.shape["tensor"]
  gathering = gathered / _rate(target, mesh, "fsdp", "context")
  model = config["model"]
  passes = 3 if remat else 2
  one = 2 * parts * _tokens(config, mesh, parts) * model["width"]
  one *= passes * model["layers"]
  waiting = 0.0
  # Three sums of a layer, each there and back; queries, keys, values, results.
  for axis, times in (("tensor", 3 * 2), ("context", 4)):
    n = mesh.shape[axis]
    if n > 1:
      waiting += one * times * (n - 1) / n / _rate(target, mesh, axis)
  return max(work, gathering) + waiting


def _rate(target: hardware.Target, mesh: Mesh, *axes: str) -> float:
  """Bytes per second that a device can receive along some axes."""
  where = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
  group = np.ravel(mesh.devices[where])
  if len(group) == 1:
    return math.inf
  return target.chip.rate(target.topology, [chip.coords for chip in group])
