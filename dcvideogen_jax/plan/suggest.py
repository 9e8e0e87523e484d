"""Ranks meshes, rematerialisation and micro-batches of a training step.

The ranking is arithmetic, for steps that train a transformer, without a
compilation. FLOPs and the activations kept for the backward pass are read off
the traced step, and the bytes of the train state off its shardings. The
collectives of a layer are counted by hand. Only the working memory of a block
is a guess.
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
# Number of float32 arrays that a block holds at once in the backward pass, of
# the model's width and of the feed-forward's width; observed in compiled steps.
_WIDE, _HIDDEN = 16, 2


class Way(NamedTuple):
  """A way to run a step, with its estimated memory and time.

  Attributes:
    mesh: sizes of the mesh axes.
    remat: a key of `wan_dit.REMAT`, or None for no rematerialisation.
    accumulate: number of micro-batches.
    bytes: estimated peak memory of one device.
    seconds: estimated time of a step.
  """

  mesh: Mapping[str, int]
  remat: str | None
  accumulate: int
  bytes: float
  seconds: float

  def change(self, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a training that runs its steps this way."""
    model = {**config["model"], "remat": self.remat}
    mesh, parts = dict(self.mesh), self.accumulate
    return {**config, "mesh": mesh, "accumulate": parts, "model": model}


class _Traced(NamedTuple):
  """The cost of a step that is traced for a single device.

  Attributes:
    flops: FLOPs of the step.
    kept: bytes that its scan over layers keeps for the backward pass.
  """

  flops: int
  kept: int


def rank(config: Mapping[str, Any], target: hardware.Target) -> list[Way]:
  """Returns ways to run a step: those that fit first, then by time.

  Args:
    config: config of a training; its batch size and its clips stay.
    target: the hardware.

  Raises:
    errors.UserError: if the config trains no transformer, or no mesh splits its
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
    except errors.UserError:  # This mesh cannot shard some leaf.
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
  """Traces the step as a single device would run it."""
  model = {**config["model"], "remat": remat}
  one = {**config, "model": model, "mesh": {}, "accumulate": 1}
  run = step.plan(one, target.devices[:1])
  jaxpr = step.trace(run, one, training.batch(one)).jaxpr.jaxpr
  return _Traced(flops.count(jaxpr), _kept(jaxpr))


def _kept(jaxpr: Any) -> int:
  """Returns the most bytes that any scan in a jaxpr stacks over its steps."""
  most = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scan":
      # A stacked output has an axis of steps that it lacks inside the body.
      (body,) = flops.inner(eqn.params)
      pairs = zip(eqn.outvars, body.outvars, strict=True)
      made = [x.aval for x, y in pairs if x.aval.ndim > y.aval.ndim]
      most = max(most, sum(x.size * x.dtype.itemsize for x in made))
    most = max([most, *map(_kept, flops.inner(eqn.params))])
  return most


def _state(tree: Any, mesh: Mesh, rules: Any) -> int:
  """Returns the bytes of a tree of shapes on one device."""
  return sum(
    math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, where in zip(
      jax.tree.leaves(tree),
      jax.tree.leaves(sharding.shardings(tree, mesh, rules)),
      strict=True,
    )
  )


def _tokens(config: Mapping[str, Any], mesh: Mesh, parts: int) -> float:
  """Returns the number of tokens of a micro-batch on one device."""
  b, *grid, _ = training.batch(config)[config["space"]].shape
  tokens = math.prod(grid) // math.prod(config["model"]["patch"])
  split = sharding.num_shards(mesh, "batch") * sharding.num_shards(
    mesh, "tokens"
  )
  return b * tokens / (split * parts)


def _held(
  config, mesh: Mesh, parts: int, traced: _Traced, gradients: float
) -> float:
  """Returns the bytes of activations, and of gradients of micro-batches.

  The mesh axis "tensor" shards only a part of the activations that are kept for
  the backward pass; here it is taken to shard none of them.
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
  """Estimates the seconds of a step.

  Computation overlaps with gathering weights, so the longer of the two counts;
  the exchange of activations is added.
  """
  peak = target.chip.flops[config["dtype"]]
  work = traced[remat].flops / (mesh.size * peak)
  weights = sum(
    x.size * x.dtype.itemsize
    for x in jax.tree.leaves((run.state.params, run.frozen))
  )
  # Weights are gathered in the forward and in the backward pass; float32
  # gradients are scattered once.
  trained = sum(x.size * 4 for x in jax.tree.leaves(run.state.params))
  gathered = parts * (2 * weights + trained) / mesh.shape["tensor"]
  gathering = gathered / _rate(target, mesh, "fsdp", "context")
  model = config["model"]
  passes = 3 if remat else 2
  one = 2 * parts * _tokens(config, mesh, parts) * model["width"]
  one *= passes * model["layers"]
  waiting = 0.0
  # "tensor": three all-reduces of a layer, each of which sends its array twice.
  # "context": queries, keys, values and results change between shards of tokens
  # and shards of heads.
  for axis, times in (("tensor", 3 * 2), ("context", 4)):
    n = mesh.shape[axis]
    if n > 1:
      waiting += one * times * (n - 1) / n / _rate(target, mesh, axis)
  return max(work, gathering) + waiting


def _rate(target: hardware.Target, mesh: Mesh, *axes: str) -> float:
  """Returns bytes per second that a device can receive along mesh axes."""
  where = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
  group = np.ravel(mesh.devices[where])
  if len(group) == 1:
    return math.inf
  return target.chip.rate(target.topology, [chip.coords for chip in group])
