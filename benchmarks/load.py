"""Times loading a checkpoint with this project and with diffusers."""

import os
import pathlib
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import processes, tables
from dcvideogen_jax import errors
from dcvideogen_jax.convert import api, matching, naming, sources, writing

SIDES = ("jax", "torch")
_KIND, _LAYOUT = "wan_dit", "diffusers"


def compare(
  variant: str,
  sides: Sequence[str] = SIDES,
  repeats: int = 1,
  shard_gb: float = 1.0,
) -> dict[str, Any]:
  """Loads the same random bfloat16 weights on each side.

  The weights are written in diffusers' format, as several files in a temporary
  directory. Each load runs in its own process with the files in the operating
  system's page cache. After loading, every value is read once, so that pages
  that were only mapped count too.

  Args:
    variant: a variant of the kind "wan_dit", such as "wan2.1-t2v-1.3b".
    sides: names of `SIDES`, run in this order.
    repeats: number of loads on each side; the sides alternate.
    shard_gb: size of a file in GB (1e9 bytes).

  Returns:
    A JSON object with the settings, `file_bytes`, and `sides`, by name, with
    lists of seconds (`load_s`; `read_s`; `cpu_s`, the CPU time of all cores for
    both) and bytes (`grown_bytes`: peak resident memory minus resident memory
    after the imports).

  Raises:
    errors.UserError: if the variant is unknown, the process of a side fails, or
      the sides loaded different values.
  """
  variants = api.KINDS[_KIND].variants
  if variant not in variants:
    raise errors.UserError(
      f"unknown variant {variant!r}: expected one of {[*variants]}"
    )
  measured: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
  with tempfile.TemporaryDirectory() as folder:
    size = write(pathlib.Path(folder), variants[variant], shard_gb)
    _read_once(pathlib.Path(folder))
    for _ in range(repeats):
      for side in sides:
        measured[side].append(
          processes.run(
            "benchmarks.load_worker",
            {"side": side, "directory": folder},
          )
        )
  checksums = {run["checksum"] for runs in measured.values() for run in runs}
  if len(checksums) > 1:
    raise errors.UserError(f"the sides hold different values: {measured}")
  names = ("load_s", "read_s", "cpu_s", "grown_bytes")
  return {
    "variant": variant,
    "machine": platform.machine(),
    "cores": os.cpu_count(),
    "jax": jax.__version__,
    "file_bytes": size,
    "sides": {
      side: {name: [run[name] for run in runs] for name in names}
      for side, runs in measured.items()
    },
  }


def write(
  directory: pathlib.Path, fields: Mapping[str, Any], shard_gb: float
) -> int:
  """Writes random bfloat16 weights in diffusers' format.

  Args:
    directory: an existing folder.
    fields: configuration of the transformer.
    shard_gb: size of a file in GB (1e9 bytes).

  Returns:
    The size of all files in bytes.
  """
  module = api.KINDS[_KIND].build(fields)
  shapes = naming.torch_shapes(
    api.KINDS[_KIND].layouts[_LAYOUT], matching.parameters(_KIND, module)
  )
  values = np.random.default_rng(0).normal(scale=0.02, size=1 << 20)
  values = values.astype(jnp.bfloat16)
  tensors = {
    name: sources.Tensor(
      shape,
      values.dtype,
      lambda i=i, shape=shape: np.resize(np.roll(values, i), shape),
    )
    for i, (name, shape) in enumerate(shapes.items())
  }
  config = api.KINDS[_KIND].configs[_LAYOUT](api.config_of(module))
  files = writing.write_directory(
    directory,
    api.KINDS[_KIND].stem,
    tensors,
    config,
    shard_size=int(shard_gb * 1e9),
  )
  return sum(file.stat().st_size for file in files)


def _read_once(directory: pathlib.Path) -> None:
  """Brings files from the disk into the operating system's page cache."""
  os.sync()
  memory = bytearray(1 << 24)
  for path in sorted(directory.iterdir()):
    with path.open("rb", buffering=0) as file:
      while file.readinto(memory):
        pass


def table(report: Mapping[str, Any]) -> str:
  """Formats the report with the ratio of the first side to the second."""
  size = report["file_bytes"]
  rows = [
    ("load, s", lambda side: statistics.median(side["load_s"])),
    ("read once, s", lambda side: statistics.median(side["read_s"])),
    ("both, CPU s", lambda side: statistics.median(side["cpu_s"])),
    (
      "memory / files",
      lambda side: statistics.median(side["grown_bytes"]) / size,
    ),
  ]
  lines = tables.lines(report["sides"], rows)
  return "\n".join([*lines, f"{report['variant']}, {size / 1e9:.2f} GB"])
