"""Formats plans as tables to print."""

from collections.abc import Mapping, Sequence
from typing import Any

from dcvideogen_jax.plan import suggest

_GIB = 2**30
_PASSES = {1: "one pass", 2: "two passes"}
# Keys of "bytes" that add up to the peak, in the order of
# `plan.training.measure`.
_TAKERS = (
  "parameters",
  "optimiser",
  "average",
  "frozen",
  "batch",
  "outputs",
  "temporaries",
  "program",
)


# The head of a table; `attention` formats its lines.
ATTENTION = (
  "tokens   block  pass      implementation    TFLOP  GB at least  MiB of"
  " temporaries  kernels: registers, spilled, KiB shared"
)


def attention(case: Mapping[str, Any], found: Mapping[str, Any]) -> str:
  """Formats a result of `plan.attention.measure` as a line of the table."""
  mask = case["mask"]
  start = (
    f"{case['tokens']:<7} {mask.block if mask else '-':>6}  "
    f"{'both' if case['backward'] else 'forward':8}  "
    f"{case['implementation']:14}"
  )
  if "refused" in found:
    return f"{start}  cannot be computed: {found['refused']}"
  if "too_large" in found:
    return f"{start}  does not fit: {found['too_large']}"
  kernels = "; ".join(
    f"{name.removeprefix('attention_')} {one.get('registers', '?')}, "
    f"{one.get('spilled', '?')}, {one['shared'] / 2**10:.0f}"
    for name, one in found["kernels"].items()
  )
  return (
    f"{start} {found['flops'] / 1e12:8.2f} {found['traffic'] / 1e9:12.2f} "
    f"{found['temporaries'] / 2**20:19.0f}  {kernels}"
  ).rstrip()


# The head of a table; `decoding` formats its lines.
DECODING = (
  "budget    cut rows state   runs  peak GiB  planned  temporaries  work  TFLOP"
)


def decoding(row: Mapping[str, Any]) -> str:
  """Formats a row of `plan.autoencoder.decodings` as a line of the table."""
  name, plan = row["budget"], row["plan"]
  if "too_large" in row:
    return f"{name:9} does not fit: {row['too_large']}"
  last = [*row["programs"].values()][-1]
  state = "host" if plan["offload"] else "device"
  return (
    f"{name:9} {plan['cut'] or '-':>3} {plan['rows'] or '-':>4} {state:7}"
    f"{last['runs']:5}  {row['bytes'] / _GIB:8.2f} "
    f"{plan['bytes'] / _GIB:8.2f}  "
    f"{last['temporaries'] / _GIB:11.2f}  {row['work']:4.2f} "
    f"{row['flops'] / 1e12:6.0f}"
  )


def ways(ranked: Sequence[suggest.Way]) -> str:
  """Formats the result of `plan.suggest.rank` as a table."""
  lines = [f"{'by arithmetic':57} GiB  ms a step"]
  for one in ranked:
    lines.append(
      f"{way(one):52} {one.bytes / _GIB:8.1f} {1e3 * one.seconds:10.1f}"
    )
  return "\n".join(lines)


def way(one: suggest.Way) -> str:
  """Formats a way to run a step, without its figures."""
  again = f"remat {one.remat}" if one.remat else "no remat"
  return f"{mesh(one.mesh)}; {again}; accumulate {one.accumulate}"


def training(found: Mapping[str, Any]) -> str:
  """Formats the result of `plan.training.measure` as a table."""
  numbers, seconds = found["parameters"], found["seconds"]
  peak, capacity = found["bytes"]["peak"], found["bytes"]["capacity"]
  lines = [
    f"mesh {mesh(found['mesh'])}; batch {batch(found['batch'])}",
    f"parameters: {numbers['trainable'] / 1e6:.1f} M trained, "
    f"{numbers['frozen'] / 1e6:.1f} M frozen",
    "",
    "of one device      GiB",
    *(
      f"  {name:13} {found['bytes'][name] / _GIB:7.2f}"
      for name in _TAKERS
      if found["bytes"][name]
    ),
    f"  peak          {peak / _GIB:7.2f} of {capacity / _GIB:.2f}, which "
    f"{'fits' if fits(found) else 'does not fit'}",
    "",
    *_collectives(found["collectives"]),
    f"computes   {found['flops'] / 1e12:9.2f} TFLOP  "
    f"{1e3 * seconds['compute']:9.1f} ms",
    f"moves      {found['traffic'] / 1e9:9.2f} GB     "
    f"{1e3 * seconds['memory']:9.1f} ms",
    f"a step takes {1e3 * seconds['total']:.1f} ms or more: the longest of "
    "what computes, moves and overlaps, plus what waits",
    f"estimated MFU {100 * found['utilisation']:.1f} %: "
    f"{found['useful_flops'] / 1e12:.2f} TFLOP without what is computed again",
  ]
  return "\n".join(lines)


def _collectives(rows: Any) -> list[str]:
  """Formats collectives, a line per kind, group size and kind of overlap."""
  if not rows:
    return []
  total: dict[tuple[str, bool, int], list[float]] = {}
  for row in rows:
    key = row["kind"], row["overlaps"], len(row["group"])
    entry = total.setdefault(key, [0, 0, 0])
    for i, name in enumerate(("count", "bytes", "seconds")):
      entry[i] += row[name]
  lines = ["collectives                 of  times         GB         ms"]
  for (kind, overlaps, devices), (count, size, seconds) in sorted(
    total.items(), key=lambda item: -item[1][1]
  ):
    how = "overlaps" if overlaps else "waits"
    lines.append(
      f"  {kind:18} {how:8}{devices:4}{count:7} {size / 1e9:10.3f} "
      f"{1e3 * seconds:10.2f}"
    )
  return [*lines, ""]


def fits(found: Mapping[str, Any]) -> bool:
  """Whether a step's peak is within the device's capacity."""
  return found["bytes"]["peak"] <= found["bytes"]["capacity"]


def mesh(sizes: Mapping[str, int]) -> str:
  """Formats the mesh axes of more than one device."""
  named = [f"{axis} {n}" for axis, n in sizes.items() if n > 1]
  return ", ".join(named) or "of one device"


def batch(shapes: Mapping[str, Any]) -> str:
  """Formats the shapes of the arrays of a batch."""
  return ", ".join(
    f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()
  )


def sampling(found: Mapping[str, Any], steps: int) -> str:
  """Formats the result of `plan.sampling.measure` as a table.

  Args:
    found: the result.
    steps: number of solver steps of a video.
  """
  lines = ["weights             GiB"]
  for name, n in found["weights"].items():
    lines.append(f"{name:15} {n / _GIB:7.2f}")
  lines.append(
    "program           runs  arguments  outputs  temporaries  others  "
    "all GiB   TFLOP"
  )
  for phase, report in found["phases"].items():
    for name, row in report["programs"].items():
      lines.append(_program(f"{phase} {name}", report, row))
  step, seconds = found["step"], found["seconds"]["total"]
  within = found["peak"] <= found["limit"]
  lines += [
    f"weights and the largest program at once: {found['peak'] / _GIB:.1f} of "
    f"{found['limit'] / _GIB:.1f} GiB, which "
    f"{'fits' if within else 'does not fit'}",
    f"estimate, from the data sheet's peak rates: a step, on one device "
    f"{step['flops'] / 1e12:.0f} TFLOP in {_PASSES[step['passes']]} of the "
    f"transformer, takes {seconds:.2f} s or more, {steps} steps "
    f"{steps * seconds:.0f} s or more",
  ]
  return "\n".join(lines)


def _program(name: str, report: Any, row: Mapping[str, int]) -> str:
  others = row["waiting"] + report["held"]
  gib = [
    n / _GIB
    for n in (
      row["arguments"],
      row["outputs"],
      row["temporaries"],
      others,
      row["bytes"] + report["held"],
    )
  ]
  runs = report["runs"] * row["runs"]
  return (
    f"{name:17}{runs:5}  {gib[0]:9.2f}{gib[1]:9.2f}{gib[2]:13.2f}"
    f"{gib[3]:8.2f}{gib[4]:9.2f}{row['flops'] / 1e12:8.1f}"
  )


def machine(found: Mapping[str, Any]) -> str:
  """Formats the result of `plan.machine.report`."""
  versions, device, host = (found[k] for k in ("versions", "devices", "host"))
  lines = [", ".join(f"{k} {v}" for k, v in versions.items()), "", "packages"]
  for row in found["packages"]:
    version = row["version"] or "not installed"
    why = f"for {row['purpose']}" if row["purpose"] else row["needs"]
    lines.append(f"  {row['name']:22} {version:14} {why}")
  limit = device["limit_bytes"]
  lines += [
    "",
    "devices",
    f"  {device['count']} of {device['kind']} ({device['platform']}), "
    f"{_gib(device['free_bytes'])} free"
    + ("" if limit is None else f" of the {_gib(limit)} that jax may use"),
    f"  host: {host['cores']} cores, {_gib(host['free_bytes'])} free of "
    f"{_gib(host['memory_bytes'])}",
    "",
    "caches",
  ]
  for row in found["caches"]:
    free = row["free_bytes"]
    lines.append(
      f"  {row['what']:22} {row['bytes'] / _GIB:6.2f} GiB in {row['files']} "
      f"files, {row['path']}"
      + ("" if free is None else f" ({free / _GIB:.0f} GiB free)")
    )
  return "\n".join(lines)


def fitting(row: Any) -> str:
  """Formats a `plan.fits.Row` as a line."""
  time = ""
  if row.step_seconds is not None:
    time = f"{row.steps} steps in {_time(row.steps * row.step_seconds)} or more"
  name = (
    f"  {row.config:24} {row.tokens:7} tokens {row.bytes / _GIB:7.1f} GiB  "
  )
  if row.flags is None:
    return f"{name}does not fit"
  return f"{name}fits  {time}{''.join(f'  {x}' for x in row.flags)}".rstrip()


def _gib(count: int) -> str:
  return f"{count / _GIB:.1f} GiB"


def _time(seconds: float) -> str:
  if seconds < 100:
    return f"{seconds:.0f} s"
  minutes = seconds / 60
  return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
