"""How long a program takes at the least, by data sheets."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax

from dcvideogen_jax import flops
from dcvideogen_jax.plan import hardware, hlo


class Work(NamedTuple):
  """What one device does.

  Attributes:
    flops: that it computes.
    useful: those of them that are no rematerialisation.
    traffic: bytes of its memory that are read and written.
    collectives: what it exchanges with others.
    dtype: of the products.
  """

  flops: float
  useful: float
  traffic: float
  collectives: Sequence[hlo.Collective] = ()
  dtype: str = "bfloat16"


def work(
  traced: jax.stages.Traced,
  program: jax.stages.Compiled,
  devices: int,
  dtype: str,
  useful: float | None = None,
) -> Work:
  """What each of some devices does in a compiled program.

  XLA may compute the same on several of them, which only the compiled program
  knows; what libraries compute only the traced one does.

  Args:
    traced, program: the same, before and after it was compiled.
    devices: how many.
    dtype: of the products.
    useful: FLOPs of a device without rematerialisation; None is all.

  Raises:
    errors.UserError: if a loop runs an unknown number of times.
  """
  text, jaxpr = hlo.Program(program.as_text()), traced.jaxpr.jaxpr
  kernels = flops.count(jaxpr, kernels_only=True) / devices
  computed = max(flops.count(jaxpr) / devices, text.flops() + kernels)
  return Work(
    computed,
    computed if useful is None else useful,
    text.traffic(),
    text.collectives(),
    dtype,
  )


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds that no program with this work can stay below.

  Attributes:
    compute, memory: each alone at the data sheet's rate.
    overlapped: collectives during which a device computes.
    exposed: the others.
  """

  compute: float
  memory: float
  overlapped: float
  exposed: float

  @property
  def total(self) -> float:
    """The largest of what goes on at the same time, and what does not."""
    return max(self.compute, self.memory, self.overlapped) + self.exposed


def estimate(
  target: hardware.Target,
  work: Work,
  devices: Sequence[jax.Device] | None = None,
) -> Estimate:
  """The roofline of some work.

  Args:
    target: what it runs on.
    work: of one device.
    devices: those of the target in the order in which `work.collectives` count
      them.
  """
  seconds = {True: 0.0, False: 0.0}
  for one in work.collectives:
    seconds[one.overlaps] += one.bytes / rate(target, one.group, devices)
  return Estimate(
    work.flops / target.chip.flops[work.dtype],
    work.traffic / target.chip.bandwidth,
    seconds[True],
    seconds[False],
  )


def rate(
  target: hardware.Target,
  group: Iterable[int],
  devices: Sequence[jax.Device] | None = None,
) -> float:
  """Bytes per second that a device can receive from its group."""
  devices = target.devices if devices is None else devices
  chips = [devices[i].coords for i in group]
  if len(chips) == 1:  # It gets nothing.
    return math.inf
  return target.chip.rate(target.topology, chips)


def utilisation(target: hardware.Target, work: Work, seconds: float) -> float:
  """Useful FLOPs over those that the data sheet promises in the time (MFU)."""
  return work.useful / (seconds * target.chip.flops[work.dtype])
