"""Accelerators that XLA can compile for without one being present."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dcvideogen_jax import errors, flops
from dcvideogen_jax.plan import tpus

# Share of a GPU's memory that programs let jax take. CUDA's context and the
# kernels of its libraries need the remainder.
FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU: what XLA's compiler needs to know about it, and its peak rates.

  The figures come from the vendor's data sheets and CUDA's device query, for
  the B200 from XLA's `target_config/specs/b200.txtpb` (openxla/xla, 300ec95).

  Attributes:
    kind: the driver's name of the device, which jax's kernels look at.
    cores: number of streaming multiprocessors.
    clock_ghz: clock rate in GHz.
    fpus_per_core: floating-point units of a multiprocessor.
    bandwidth: memory bandwidth in bytes per second.
    memory: size of the device memory in bytes.
    flops: its row of `flops.PEAKS`, in FLOPs per second by dtype.
    l2_cache: size of the L2 cache in bytes.
    shared_per_core: shared memory of a multiprocessor in bytes.
    shared_per_block: largest shared memory of a thread block in bytes.
    capability: CUDA's compute capability, as text of XLA's protobuf.
    threads_per_core: largest number of threads on a multiprocessor.
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
  threads_per_core: int = 2048

  @property
  def usable(self) -> int:
    """Bytes of device memory that programs let jax take."""
    return int(self.memory * FRACTION)

  @property
  def architecture(self) -> str:
    """CUDA's name of the code that the GPU runs, such as "sm_90a"."""
    major, minor = (
      re.search(rf"{part}: (\d+)", self.capability)
      for part in ("major", "minor")
    )
    assert major is not None
    own = "a" if "ACCELERATED" in self.capability else ""
    return f"sm_{major[1]}{minor[1] if minor else 0}{own}"

  def text(self) -> str:
    """Returns the device as a GpuTargetConfigProto in text form."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_per_core}
  threads_per_core_limit: {self.threads_per_core}
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

# Ada and the Blackwell of workstations: no thread block takes more than 99 KiB.
_SMALL = {
  "fpus_per_core": 128,
  "shared_per_core": 102400,
  "shared_per_block": 101376,
  "threads_per_core": 1536,
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
  "b200": Gpu(
    kind="NVIDIA B200",
    cores=148,
    clock_ghz=1.965,
    fpus_per_core=128,
    bandwidth=7672320000000,
    memory=191514411008,
    l2_cache=132644864,
    shared_per_core=233472,
    shared_per_block=232448,
    capability="major: 10 feature_extension: ACCELERATED_FEATURES",
    flops=flops.PEAKS["NVIDIA B200"],
  ),
  "l40s": Gpu(
    kind="NVIDIA L40S",
    cores=142,
    clock_ghz=2.52,
    bandwidth=864000000000,
    memory=int(44.4 * 2**30),
    l2_cache=100663296,
    capability="major: 8 minor: 9",
    flops=flops.PEAKS["NVIDIA L40S"],
    **_SMALL,
  ),
  "rtx4090": Gpu(
    kind="NVIDIA GeForce RTX 4090",
    cores=128,
    clock_ghz=2.52,
    bandwidth=1008000000000,
    memory=int(23.64 * 2**30),
    l2_cache=75497472,
    capability="major: 8 minor: 9",
    flops=flops.PEAKS["NVIDIA GeForce RTX 4090"],
    **_SMALL,
  ),
  "rtx5090": Gpu(
    kind="NVIDIA GeForce RTX 5090",
    cores=170,
    clock_ghz=2.407,
    bandwidth=1792000000000,
    memory=int(31.36 * 2**30),
    l2_cache=100663296,
    capability="major: 12",
    flops=flops.PEAKS["NVIDIA GeForce RTX 5090"],
    **_SMALL,
  ),
}


class Target(NamedTuple):
  """Hardware to compile for: a single GPU or a TPU slice.

  Attributes:
    name: such as "h100" or "v5p:4x4x4".
    chip: the kind of its devices.
    devices: the devices, which need not be present.
    topology: number of chips along each axis of a slice; () for a GPU.
  """

  name: str
  chip: Gpu | tpus.Tpu
  devices: tuple[jax.Device, ...]
  topology: tuple[int, ...] = ()


def find(name: str) -> Target:
  """Returns a target by its name, such as "h100" or "v5p:4x4x4".

  Raises:
    errors.UserError: if the name is unknown, or the compiler for the target is
      not installed.
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
  """Returns a device to compile for, on which nothing can run.

  Args:
    name: a key of `GPUS`.

  Raises:
    errors.UserError: if jax's CUDA compiler is not installed.
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
