"""Lower bounds of a program's run time, from the peak rates of data sheets."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax

from dcvideogen_jax import flops
from dcvideogen_jax.plan import hardware, hlo


class Work(NamedTuple):
  """The work of one device in a program.

  Attributes:
    flops: FLOPs that it computes.
    useful: FLOPs without rematerialisation.
    traffic: bytes read from and written to its memory.
    collectives: exchanges with other devices.
    dtype: dtype of the matrix products.
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
  """Returns the work of each device in a compiled program.

  FLOPs are counted twice. Only the compiled program shows work that XLA repeats
  on several devices; only the traced program shows the work of libraries.

  Args:
    traced: the program before it was compiled.
    program: the compiled program.
    devices: number of devices.
    dtype: dtype of the matrix products.
    useful: FLOPs of a device without rematerialisation; None is all FLOPs.

  Raises:
    errors.UserError: if the number of iterations of a loop is unknown.
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
  """Lower bounds of a program's run time, in seconds.

  Attributes:
    compute: time of the FLOPs at the data sheet's rate.
    memory: time of the memory traffic at the data sheet's rate.
    overlapped: time of collectives during which a device computes.
    exposed: time of collectives for which a device waits.
  """

  compute: float
  memory: float
  overlapped: float
  exposed: float

  @property
  def total(self) -> float:
    """The largest of the concurrent times, plus the exposed collectives."""
    return max(self.compute, self.memory, self.overlapped) + self.exposed


def estimate(
  target: hardware.Target,
  work: Work,
  devices: Sequence[jax.Device] | None = None,
) -> Estimate:
  """Estimates the run time of some work by the roofline model.

  Args:
    target: the hardware.
    work: the work of one device.
    devices: the target's devices in the order in which `work.collectives`
      numbers them; None is the target's own order.
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
  """Returns the bytes per second that a device can receive from its group.

  Args:
    target: the hardware.
    group: numbers of the devices in the group.
    devices: the target's devices in the order of these numbers; None is the
      target's own order.
  """
  devices = target.devices if devices is None else devices
  chips = [devices[i].coords for i in group]
  if len(chips) == 1:  # The device receives nothing.
    return math.inf
  return target.chip.rate(target.topology, chips)


def utilisation(target: hardware.Target, work: Work, seconds: float) -> float:
  """Returns the MFU: useful FLOPs over peak FLOPs in a time.

  Args:
    target: the hardware.
    work: the work of one device.
    seconds: run time of the work.
  """
  return work.useful / (seconds * target.chip.flops[work.dtype])
