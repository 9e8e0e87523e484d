"""Describes this machine: packages, devices, free memory and caches."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import dcvideogen_jax
from dcvideogen_jax import errors, files, flops, memory
from dcvideogen_jax.plan import fits, hardware, tpus

_PACKAGE = "dcvideogen_jax"
# Packages that nothing requires, and what they are for.
OPTIONAL = {
  "gradio": "dcvideogen app",
  "pillow-heif": "HEIC photographs",
  "gcsfs": "gs:// paths",
}
# Files that show a driver of devices that jax may not see.
_DRIVERS = {
  "gpu": (
    "/proc/driver/nvidia/version",
    "there is an NVIDIA driver, but jax sees no GPU: pip install -r"
    " requirements-cuda.txt",
  ),
  "tpu": (
    "/dev/accel0",
    "there is a TPU, but jax does not see it: pip install -r"
    " requirements-tpu.txt",
  ),
}


def report(devices: Sequence[Any]) -> dict[str, Any]:
  """Describes the machine.

  Args:
    devices: those of jax.

  Returns:
    - "versions": of this package, of Python and of the system.
    - "packages": for each required or optional package, "name", "version" or
      None, "needs", the versions that will do, and "purpose" of optional ones.
    - "devices": "kind", "platform" and "count" of the devices, and of the first
      of them "limit_bytes" and "free_bytes".
    - "host": "cores", and "memory_bytes" and "free_bytes" of its memory.
    - "caches": for each, "what", "path", "bytes", "files", and "free_bytes" of
      its disk.
    - "problems": a sentence for each thing to mend.
  """
  packages = [*_packages()]
  return {
    "versions": {
      _PACKAGE: dcvideogen_jax.__version__,
      "python": platform.python_version(),
      "system": f"{platform.system()} {platform.machine()}",
    },
    "packages": packages,
    "devices": _devices(devices),
    "host": {
      "cores": len(os.sched_getaffinity(0))
      if sys.platform == "linux"
      else os.cpu_count(),
      "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
      "free_bytes": memory.free_on_host(),
    },
    "caches": [*_caches()],
    "problems": [*_problems(packages, devices)],
  }


def device(devices: Sequence[Any]) -> fits.Device:
  """Returns the first device, as estimates see it."""
  first = devices[0]
  limit = _limit(first)
  rates = {}
  if first.device_kind in flops.PEAKS:
    rates = flops.PEAKS[first.device_kind]
  chip = next(
    (x for x in hardware.GPUS.values() if x.kind == first.device_kind), None
  )
  return fits.Device(
    first.platform,
    memory.free_on_host() if limit is None else limit,
    rates,
    chip and chip.bandwidth,
  )


def target(name: str) -> fits.Device:
  """Returns a device that need not be here, as estimates see it.

  Args:
    name: a key of `hardware.GPUS` or `tpus.TPUS`.

  Raises:
    errors.UserError: for another name.
  """
  chips = {**hardware.GPUS, **tpus.TPUS}
  chip = errors.choose("--target", name, chips)
  kind = "gpu" if name in hardware.GPUS else "tpu"
  return fits.Device(kind, chip.usable, chip.flops, chip.bandwidth)


def _packages() -> Iterator[dict[str, Any]]:
  for line in _requirements():
    name, needs = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?(.*)", line).groups()
    yield {
      "name": name,
      "version": _version(name),
      "needs": needs.replace(" ", ""),
      "purpose": None,
    }
  for name, purpose in OPTIONAL.items():
    yield {
      "name": name,
      "version": _version(name),
      "needs": "",
      "purpose": purpose,
    }


def _requirements() -> list[str]:
  """Returns the lines of requirements.txt, also where it is not."""
  here = pathlib.Path(dcvideogen_jax.__file__).parents[1] / "requirements.txt"
  if here.is_file():
    lines = here.read_text().splitlines()
  else:
    try:
      lines = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
      lines = []
    lines = [line for line in lines if "extra ==" not in line]
  named = (line.partition("#")[0].strip() for line in lines)
  return [line for line in named if line]


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def satisfies(version: str, needs: str) -> bool:
  """Whether a version is at least, or exactly, what a requirement says.

  Args:
    version: such as "0.10.2".
    needs: ">=0.10.1", "==0.10.2" or "".
  """
  sign, wanted = needs[:2], needs[2:]
  if sign == "==":
    return version == wanted
  return sign != ">=" or _numbers(version) >= _numbers(wanted)


def _numbers(version: str) -> list[int]:
  found = [int(n) for n in re.findall(r"\d+", version.partition("+")[0])]
  while found and not found[-1]:
    found.pop()
  return found


def _devices(devices: Sequence[Any]) -> dict[str, Any]:
  first = devices[0]
  return {
    "kind": first.device_kind,
    "platform": first.platform,
    "count": len(devices),
    "limit_bytes": _limit(first),
    "free_bytes": _free(first),
  }


def _limit(first: Any) -> int | None:
  """Returns the bytes that jax may use; None where that is the host's."""
  return (first.memory_stats() or {}).get("bytes_limit")


def _free(first: Any) -> int:
  """Returns the free bytes, which other programs may share.

  jax knows what it took itself. What other programs took of a GPU is known by
  the driver.
  """
  limit = _limit(first)
  if limit is None:
    return memory.free_on_host()
  free = limit - first.memory_stats().get("bytes_in_use", 0)
  if first.platform != "gpu":
    return free
  command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader"]
  with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
    told = subprocess.run(
      [*command, "--id=0"], capture_output=True, text=True, timeout=20
    ).stdout
    return min(free, int(told.split()[0]) * 2**20)
  return free


def _caches() -> Iterator[dict[str, Any]]:
  """Yields the directories that grow with use, and their sizes."""
  own = files.cache_directory()
  found = {"compiled programs": own / "xla"}
  with contextlib.suppress(OSError):
    for path in sorted(own.iterdir()):
      if path.is_dir() and path.name != "xla":
        found[path.name] = path
  import huggingface_hub.constants

  found["models of Hugging Face"] = pathlib.Path(
    huggingface_hub.constants.HF_HUB_CACHE
  )
  for what, path in found.items():
    count, size = _size(path)
    yield {
      "what": what,
      "path": str(path),
      "bytes": size,
      "files": count,
      "free_bytes": _free_disk(path),
    }


def _size(directory: pathlib.Path) -> tuple[int, int]:
  """Returns the number of files and their bytes; links are not followed."""
  count = size = 0
  for folder, _, names in os.walk(directory):
    for name in names:
      path = os.path.join(folder, name)
      with contextlib.suppress(OSError):
        if not os.path.islink(path):
          count += 1
          size += os.lstat(path).st_size
  return count, size


def _free_disk(path: pathlib.Path) -> int | None:
  """Returns the free bytes of the disk where a path is, or will be."""
  for there in (path, *path.parents):
    if there.exists():
      return shutil.disk_usage(there).free
  return None


def _problems(
  packages: Sequence[dict[str, Any]], devices: Sequence[Any]
) -> Iterator[str]:
  for package in packages:
    name, version, needs = (package[k] for k in ("name", "version", "needs"))
    if package["purpose"]:
      continue
    mend = f"pip install '{name}{needs}'"
    if version is None:
      yield f"{name} is not installed: {mend}"
    elif not satisfies(version, needs):
      yield f"{name} is {version}, expected {needs}: {mend}"
  seen = {x.platform for x in devices}
  for kind, (path, sentence) in _DRIVERS.items():
    if kind not in seen and os.path.exists(path):
      yield sentence
  cache = files.cache_directory()
  there = next(x for x in (cache, *cache.parents) if x.exists())
  if not os.access(there, os.W_OK):
    yield (
      f"{cache} cannot be written, so that programs are compiled anew each"
      f" time: set {files.CACHE_VARIABLE} to a directory that can"
    )
