"""Accelerators that XLA compiles for although they are not there."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dcvideogen_jax import errors, flops
from dcvideogen_jax.plan import tpus

# Of a device's memory, what programs of `launch` let jax take; CUDA's context
# and the kernels of its libraries need the rest.
FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA's GPU compiler asks about a device, and how fast it may be.

  Figures are those of the vendor's data sheets and CUDA's device query.

  Attributes:
    kind: what the driver calls it; jax's kernels look at it.
    bandwidth: of its memory, bytes per second.
    memory: bytes.
    flops: its row of `flops.PEAKS`.
  """

  kind: str
  cores: int
  clock_ghz: float
  fpus_per_core: int
  bandwidth: int
  memory: int
  flops: Mapping[str, float]
  l2_cache: int
  shared_per_core: int
  shared_per_block: int
  capability: str

  @property
  def usable(self) -> int:
    """Bytes that programs of `launch` have on it."""
    return int(self.memory * FRACTION)

  def text(self) -> str:
    """A GpuTargetConfigProto in text form."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_per_core}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2_cache}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared_per_block}
  cuda_compute_capability {{ {self.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{self.kind}"
"""


_HOPPER = {
  "cores": 132,
  "clock_ghz": 1.98,
  "fpus_per_core": 128,
  "l2_cache": 52428800,
  "shared_per_core": 233472,
  "shared_per_block": 232448,
  "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
  "flops": flops.PEAKS["NVIDIA H100 80GB HBM3"],
}

GPUS = {
  "h100": Gpu(
    kind="NVIDIA H100 80GB HBM3",
    bandwidth=3352320000000,
    memory=84942979072,
    **_HOPPER,
  ),
  "h200": Gpu(
    kind="NVIDIA H200",
    bandwidth=4800000000000,
    memory=151397597184,
    **_HOPPER,
  ),
  "a100": Gpu(
    kind="NVIDIA A100-SXM4-80GB",
    cores=108,
    clock_ghz=1.41,
    fpus_per_core=64,
    bandwidth=2039040000000,
    memory=85100068864,
    l2_cache=41943040,
    shared_per_core=167936,
    shared_per_block=166912,
    capability="major: 8",
    flops=flops.PEAKS["NVIDIA A100-SXM4-80GB"],
  ),
}


class Target(NamedTuple):
  """What to compile for.

  Attributes:
    name: such as "h100" or "v5p:4x4x4".
    chip: one of its devices.
    devices: all of them.
    topology: how they are linked; () for one alone.
  """

  name: str
  chip: Gpu | tpus.Tpu
  devices: tuple[jax.Device, ...]
  topology: tuple[int, ...] = ()


def find(name: str) -> Target:
  """A target by its name, such as "h100" or "v5p:4x4x4".

  Raises:
    errors.UserError: if the name is unknown, or jax has no compiler for it.
  """
  kind, colon, sizes = name.partition(":")
  if kind in tpus.TPUS and re.fullmatch(r"\d+(x\d+)+", sizes):
    topology = tuple(map(int, sizes.split("x")))
    return Target(name, tpus.TPUS[kind], tpus.devices(kind, topology), topology)
  if name not in GPUS:
    raise errors.UserError(
      f"unknown target {name!r}: expected one of {', '.join(GPUS)}, or one of "
      f"{', '.join(tpus.TPUS)} with its chips, such as v5p:4x4x4"
    )
  return Target(name, GPUS[name], (gpu(name),))


def gpu(name: str) -> jax.Device:
  """A device to compile for; nothing can be run on it.

  Args:
    name: a key of `GPUS`.

  Raises:
    errors.UserError: if jax has no CUDA compiler.
  """
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  try:
    topology = topologies.get_topology_desc(
      platform="cuda",
      topology_name=name,
      topology="1x1x1",
      target_config=GPUS[name].text(),
    )
  except Exception as e:  # jax raises several types here.
    raise errors.UserError(
      f"cannot compile for {name}: install requirements-cuda.txt in an "
      f"environment of its own ({str(e).splitlines()[0]})"
    ) from e
  return topology.devices[0]
