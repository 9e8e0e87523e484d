"""Times one step of Wan's transformer in this project and in diffusers."""

import importlib.metadata
import json
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
from dcvideogen_jax.convert import api, matching, naming

# The packages that each side needs.
SIDES = {"jax": ("jax",), "torch": ("torch", "diffusers")}
DTYPES = ("float32", "bfloat16")
_TEXT_TOKENS = 512


def compare(
  fields: Mapping[str, Any],
  latents: tuple[int, int, int],
  *,
  dtype: str = "float32",
  sides: Sequence[str] = (*SIDES,),
  threads: int = 2,
  repeats: int = 1,
) -> dict[str, Any]:
  """Runs each side in its own process on the same random weights and inputs.

  A step is one call of the transformer on one sample, on the CPU, with 512 text
  tokens.

  Args:
    fields: configuration of a text-to-video transformer, `convert`'s kind
      "wan_dit".
    latents: frames, rows and columns of the latents; multiples of the patch.
    dtype: one of `DTYPES`, for weights and computation. Each side keeps in
      float32 what its library always keeps in float32.
    sides: names of `SIDES`, run in this order.
    threads: number of cores that a process may use.
    repeats: number of timed steps, after one that is not counted.

  Returns:
    A JSON object with the settings; `weight_bytes`; `sides`, by name, with
    seconds (`load_s`; `compile_s`; `first_s` of the step that is not counted;
    for each repeat `step_s` and `core_s`, the CPU time of all cores) and bytes
    of resident memory (`loaded_bytes` before the first step, `peak_bytes` of
    the whole process); and with two sides `difference`: the largest absolute
    difference and the largest absolute value of the output.

  Raises:
    errors.UserError: if the fields are not those of a text-to-video
      transformer, the latents do not fit it, a package that a side needs is not
      installed, or the process of a side fails.
  """
  request = _request(fields, latents, dtype)
  versions = {name: _version(name) for side in sides for name in SIDES[side]}
  report = {
    "fields": json.loads(json.dumps({**fields})),
    "latents": [*latents],
    "tokens": request.pop("tokens"),
    "weight_bytes": request.pop("weight_bytes"),
    "dtype": dtype,
    "threads": threads,
    "machine": platform.machine(),
    "versions": versions,
    "sides": {},
  }
  request |= {"threads": threads, "repeats": repeats}
  outputs = []
  with tempfile.TemporaryDirectory() as folder:
    for side in sides:
      path = pathlib.Path(folder) / f"{side}.npy"
      report["sides"][side] = processes.run(
        "benchmarks.dit_worker",
        {**request, "side": side, "output": str(path)},
      )
      outputs.append(np.load(path))
  if len(sides) == 2:
    a, b = outputs
    report["difference"] = {
      "max_abs": float(np.abs(a - b).max()),
      "largest": float(np.abs(b).max()),
    }
  return report


def table(report: Mapping[str, Any]) -> str:
  """Formats the report with the ratio of the first side to the second."""
  rows = [
    ("compile, s", lambda side: side["compile_s"]),
    ("step, s", lambda side: statistics.median(side["step_s"])),
    ("step, core seconds", lambda side: statistics.median(side["core_s"])),
    ("memory loaded, GiB", lambda side: side["loaded_bytes"] / 2**30),
    ("peak memory, GiB", lambda side: side["peak_bytes"] / 2**30),
  ]
  lines = tables.lines(report["sides"], rows)
  lines.append(
    f"{report['fields']['layers']} layers, {report['tokens']} tokens,"
    f" {report['dtype']}, weights of {report['weight_bytes'] / 2**30:.2f} GiB"
  )
  if difference := report.get("difference"):
    relative = difference["max_abs"] / difference["largest"]
    lines.append(f"outputs differ by up to {relative:.1e} of the largest value")
  return "\n".join(lines)


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError as e:
    raise errors.UserError(
      f"this comparison needs the package {package}, which is not installed"
    ) from e


def _request(fields, latents, dtype):
  """Builds the workers' request; adds the report's "tokens", "weight_bytes"."""
  kind = api.KINDS["wan_dit"]
  if dtype not in DTYPES:
    raise errors.UserError(
      f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}"
    )
  try:
    module = kind.build(
      fields, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype)
    )
  except (TypeError, ValueError) as e:
    raise errors.UserError(f"the configuration of wan_dit: {e}") from e
  if module.image_width is not None:
    raise errors.UserError(
      "expected a text-to-video model, found one that takes images too"
    )
  if any(n < 1 or n % p for n, p in zip(latents, module.patch, strict=True)):
    raise errors.UserError(
      "expected frames, rows and columns of latents that are multiples of the"
      f" patch {module.patch}, found {tuple(latents)}"
    )
  params = matching.parameters("wan_dit", module)
  rules = kind.layouts["diffusers"]
  sizes = zip(latents, module.patch, strict=True)
  return {
    "fields": {**fields},
    "config": kind.configs["diffusers"](api.config_of(module)),
    "shapes": naming.torch_shapes(rules, params),
    "dtype": dtype,
    "latents": [1, *latents, module.in_channels],
    "text": [1, _TEXT_TOKENS, module.text_width],
    "tokens": int(np.prod([n // p for n, p in sizes])),
    "weight_bytes": sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(params)
    ),
  }
