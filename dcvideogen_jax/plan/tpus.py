"""Cloud TPUs that XLA can compile for without one being present."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import topologies

from dcvideogen_jax import errors, flops

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Tpu:
  """A device of a TPU slice, and its links to other chips.

  A device of jax is a chip or, on TPU7x, one of the two cores of a chip, which
  then has half of the chip's memory, rates and links. The figures come from
  docs.cloud.google.com/tpu, except `usable`.

  Attributes:
    bandwidth: memory bandwidth in bytes per second.
    usable: bytes of memory that XLA's compiler lets a program use, as libtpu
      0.0.42 reports to a program that needs more.
    flops: its row of `flops.PEAKS`, in FLOPs per second by dtype.
    link: bytes per second to a neighbour, in each direction.
    axes: number of axes of the grid that chips are linked in.
    ring: an axis whose number of chips is a multiple of this is a ring: its
      ends are linked too. Here ends count as linked only if all axes are rings.
    cores: jax's name of how it uses the cores of a chip.
    per_chip: number of devices on a chip.
    between: bytes per second between the devices of a chip.
  """

  bandwidth: float
  usable: int
  flops: Mapping[str, float]
  link: float
  axes: int
  ring: int
  cores: str = "default"
  per_chip: int = 1
  between: float = 0

  def rate(
    self, topology: Sequence[int], chips: Sequence[Sequence[int]]
  ) -> float:
    """Returns the bytes per second that a device can receive from others.

    Args:
      topology: number of chips along each axis of the slice.
      chips: coordinates of the chips of the devices that exchange data.
    """
    ends = 2 if all(n % self.ring == 0 for n in topology) else 1
    links = 0
    for size, found in zip(topology, zip(*chips, strict=True), strict=False):
      spanned = len(set(found))
      if spanned > 1:
        links += ends if spanned == size else 1
    return self.link * links or self.between


TPUS = {
  "v4": Tpu(
    flops=flops.PEAKS["TPU v4"],
    bandwidth=1228e9,
    usable=int(30.75 * _GIB),
    link=50e9,
    axes=3,
    ring=4,
    cores="megacore",
  ),
  "v5e": Tpu(
    flops=flops.PEAKS["TPU v5 lite"],
    bandwidth=819e9,
    usable=int(15.75 * _GIB),
    link=50e9,
    axes=2,
    ring=16,
  ),
  "v5p": Tpu(
    flops=flops.PEAKS["TPU v5"],
    bandwidth=2765e9,
    usable=int(95.74 * _GIB),
    link=100e9,
    axes=3,
    ring=4,
  ),
  "v6e": Tpu(
    flops=flops.PEAKS["TPU v6 lite"],
    bandwidth=1638e9,
    usable=int(31.25 * _GIB),
    link=100e9,
    axes=2,
    ring=16,
  ),
  "tpu7x": Tpu(
    flops=flops.PEAKS["TPU7x"],
    bandwidth=3690e9,
    usable=int(94.75 * _GIB),
    link=50e9,
    axes=3,
    ring=4,
    per_chip=2,
    between=600e9,
  ),
}


# Without these variables libtpu spends minutes on finding out which machine it
# runs on, reports an error, and lets only one process use it at a time; none of
# it is needed to compile.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(name: str, topology: Sequence[int]) -> tuple[jax.Device, ...]:
  """Returns the devices of a slice to compile for, on which nothing can run.

  Args:
    name: a key of `TPUS`.
    topology: number of chips along each axis, such as (4, 4, 4).

  Raises:
    errors.UserError: if the slice does not exist, or libtpu is not installed.
  """
  chip = TPUS[name]
  layout = f"{name}:{'x'.join(map(str, topology))}"
  if len(topology) != chip.axes:
    raise errors.UserError(
      f"{name} has {chip.axes} axes, such as {name}:"
      f"{'x'.join(['4'] * chip.axes)}, found {layout}"
    )
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=layout, chip_config_name=chip.cores
    ).devices
  except Exception as e:  # jax raises several types here.
    reason = str(e).splitlines()[0]
    if "INVALID_ARGUMENT" in reason:
      raise errors.UserError(f"there is no {layout}: {reason}") from e
    raise errors.UserError(
      f"cannot compile for {layout}: install requirements-tpu.txt in an "
      f"environment of its own ({reason})"
    ) from e
  assert len(found) == math.prod(topology) * chip.per_chip
  return tuple(found)
