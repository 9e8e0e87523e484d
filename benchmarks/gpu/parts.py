"""The parts of `make gpu`, the most important first; each runs in a process.

  python -m benchmarks.gpu.parts --part=step --rows=FILE

appends a JSON object for each row to the file as soon as it is measured.
"""

import contextlib
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import app, flags

_PART = flags.DEFINE_string("part", None, "A key of PARTS.")
_ROWS = flags.DEFINE_string("rows", None, "File that gets the rows.")
_TOY = flags.DEFINE_bool("toy", False, "Run at toy size, on any device.")
_TARGET = flags.DEFINE_string(
  "target", None, "A GPU to compile for instead of running, such as h200."
)
_SECONDS = flags.DEFINE_float("seconds", 60, "No case starts after these.")

Row = dict[str, Any]


class Setting(NamedTuple):
  """Where and how large a part runs.

  Attributes:
    toy: whether models and arrays are tiny.
    device: what is compiled for.
    run: whether the device is there.
    free: bytes of its memory that programs may take.
  """

  toy: bool
  device: Any
  run: bool
  free: float

  @property
  def platform(self) -> str:
    """The device's platform; "gpu" for one that is not there, too."""
    name = self.device.platform
    return "gpu" if name == "cuda" else name


class Part(NamedTuple):
  """A part.

  Attributes:
    title: what it measures.
    seconds: the most that it may take.
    rows: yields functions that each measure a row, so that one that fails keeps
      no other from running.
  """

  title: str
  seconds: float
  rows: Callable[[Setting], Iterator[Callable[[], Row]]]


def _measured(cases: Iterable[Any], setting: Setting):
  from benchmarks.gpu import cases as cases_lib

  for case in cases:
    yield lambda case=case: {
      "case": case.name,
      **cases_lib.measure(case, setting.device, setting.run),
    }


def _machine(setting):
  from benchmarks.gpu import programs

  yield lambda: _versions(setting)
  yield from _measured(programs.machine(setting.toy), setting)


def _versions(setting: Setting) -> Row:
  import jax

  return {
    "case": setting.device.device_kind,
    "jax": jax.__version__,
    "jaxlib": jax.lib.__version__,
    "python": sys.version.split()[0],
    "runtime": setting.device.client.platform_version.split("\n")[-1].strip()
    if setting.run
    else "compiled, not run",
    "free GiB": setting.free / 2**30,
  }


def _kernels(setting):
  from benchmarks.gpu import kernels

  if setting.run:
    yield from kernels.rows(setting.platform, few=setting.toy)
  else:
    yield from _measured(kernels.cases(), setting)


def _attention(setting):
  from benchmarks.gpu import programs

  return _measured(programs.attentions(setting.toy, setting.platform), setting)


def _steps(setting):
  from benchmarks.gpu import programs

  return _measured(programs.steps(setting.toy), setting)


def _trainings(setting):
  from benchmarks.gpu import programs

  return _measured(programs.trainings(setting.toy), setting)


def _decoding(height: int, width: int, budget: float | None):
  def rows(setting):
    from benchmarks.gpu import decoding
    from dcvideogen_jax import memory

    size = (32, 32) if setting.toy else (height, width)
    # The remainder is for cuDNN's workspaces and for fragmentation.
    most = min(budget or setting.free, memory.SHARE * setting.free)
    yield lambda: decoding.measure(
      setting.toy, *size, most, setting.device, setting.run
    )

  return rows


def _tests(setting):
  if setting.run:
    yield lambda: _pytest(setting)


def _pytest(setting: Setting) -> Row:
  """Runs the tests marked `gpu`; their settings are not those of the suite."""
  try:
    import pytest
  except ImportError:
    return {"case": "pytest -m gpu", "result": "pytest is not installed"}
  if setting.platform != "gpu":
    os.environ["DCVIDEOGEN_GPU_TESTS"] = setting.platform
  folder = pathlib.Path(__file__).parents[2] / "tests" / "gpu"
  options = ["-m", "gpu", "--noconftest", "-q", "-p", "no:cacheprovider"]
  # In this process: another one would find the GPU's memory taken.
  with contextlib.redirect_stdout(io.StringIO()) as said:
    code = pytest.main([*options, str(folder)])
  lines = said.getvalue().strip().splitlines() or [""]
  row: Row = {"case": "pytest -m gpu", "result": lines[-1]}
  if code:
    failed = [x for x in lines if x.startswith(("FAILED", "ERROR"))]
    row["failed"] = " ".join(failed) or f"exit code {code}"
  return row


_GIB = 2**30
PARTS: dict[str, Part] = {
  "machine": Part("Rates that the machine reaches", 50, _machine),
  "kernels": Part("Kernels against their references", 80, _kernels),
  "attention": Part("Attention, 40 heads of 128", 100, _attention),
  "step": Part("A pass of the transformer, 1.3B", 80, _steps),
  "decode_704x1280": Part(
    "DC-AE-V decodes 40 frames, all free memory",
    90,
    _decoding(704, 1280, None),
  ),
  "train": Part("A training step, 1.3B", 70, _trainings),
  "decode_2176x3840": Part(
    "DC-AE-V decodes 40 frames within 24 GiB",
    90,
    _decoding(2176, 3840, 24 * _GIB),
  ),
  "tests": Part("Tests marked gpu", 60, _tests),
}


def run(part: str, setting: Setting, seconds: float) -> Iterator[Row]:
  """Yields the rows of a part; a row that fails has its error in "failed".

  Args:
    part: a key of `PARTS`.
    setting: where and how large it runs.
    seconds: no row is begun after these.
  """
  end = time.monotonic() + seconds
  for measure in PARTS[part].rows(setting):
    if time.monotonic() > end:
      yield {"part": part, "case": "the rest", "failed": "no time was left"}
      return
    yield {"part": part, **_guarded(measure)}


def _guarded(measure: Callable[[], Row]) -> Row:
  try:
    return measure()
  except Exception as e:
    first = (str(e).strip().splitlines() or ["no reason given"])[0]
    return {"case": "?", "failed": f"{type(e).__name__}: {first}"}


def main(argv: Sequence[str]) -> None:
  """Runs a part and appends its rows to the file."""
  del argv
  import jax

  from dcvideogen_jax import memory
  from dcvideogen_jax.plan import hardware

  if _TARGET.value:
    target = hardware.find(_TARGET.value)
    where = (target.devices[0], False, target.chip.usable)
  else:
    where = (jax.devices()[0], True, memory.free())
  setting = Setting(_TOY.value, *where)
  with open(_ROWS.value, "a", encoding="utf-8") as file:
    for row in run(_PART.value, setting, _SECONDS.value):
      print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
  app.run(main)
