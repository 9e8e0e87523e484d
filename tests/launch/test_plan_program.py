"""launch.plan: what it prints, its exit codes, and its one sentence.

Its flags choose the program: `dcvideogen plan train`, `sample`, `decode` or
`attention`.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests import compiling
from tests.launch import launching

# The program on this machine's CPU, with small models under the released names
# and a GPU that has little memory.
ON_CPU = """
  import dataclasses
  import os

  import jax

  from dcvideogen_jax.models import dc_ae_v, umt5, wan_dit
  from dcvideogen_jax.plan import hardware

  dc_ae_v.VARIANTS["f32t4c32"] = {
    "latent_channels": 32,
    "widths": (8, 8, 8, 8, 8, 8, 8),
    "depths": (0, 1, 1, 1, 1, 1, 1),
    "chunk_frames": 8,
  }
  dc_ae_v.FAST["f32t4c32"] = {
    **dc_ae_v.VARIANTS["f32t4c32"], "widths": (8, 4, 4, 8, 8, 8, 8)
  }
  wan_dit.VARIANTS["dc-wan2.1-t2v-1.3b"] |= {
    "layers": 2, "width": 24, "heads": 2, "ffn_width": 32, "text_width": 8
  }
  umt5.VARIANTS["umt5_xxl"] = {
    "vocab": 32, "layers": 1, "width": 8, "heads": 2, "head_width": 4,
    "ffn_width": 16,
  }
  gpus = dict(hardware.GPUS)
  gpus["a100"] = dataclasses.replace(gpus["a100"], memory=1000)
  hardware.find = lambda name: hardware.Target(
    name, gpus[name], tuple(jax.devices())
  )

  from dcvideogen_jax.plan import attention, autoencoder, compiled

  if "NO_ROOM" in os.environ:
    def measure(*args, **options):
      raise compiled.TooLarge("there is no room")
    autoencoder.measure = measure
  attention._DENSE["gpu"] = ("cudnn",)
  attention._MASKED["gpu"] = ("by_chunks",)

  import runpy
  runpy.run_module("launch.plan", run_name="__main__")
"""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
  directory = tmp_path_factory.mktemp("plan")
  path = directory / "prog.py"
  path.write_text(textwrap.dedent(ON_CPU))

  def run(*flags):
    finished = subprocess.run(
      [sys.executable, path, *flags],
      env={
        **os.environ,
        "PYTHONPATH": str(launching.ROOT),
        "HOME": str(directory),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.FLAGS,
      },
      capture_output=True,
      text=True,
    )
    return launching.Finished(
      finished.returncode, finished.stdout, finished.stderr
    )

  return run


SAMPLING = (
  f"--config={launching.ROOT}/configs/sample.py:dc-t2v-1.3b",
  "--config.height=64",
  "--config.width=96",
  "--config.dtype=float32",
)
TRAINING = f"--config={launching.ROOT}/configs/adapt.py:tiny_t2v,runlocal"


def test_sampling_that_fits(on_cpu, tmp_path):
  path = tmp_path / "plan.json"
  changes = ("--config.frames=16", "--config.steps=3", f"--json={path}")
  finished = on_cpu(*SAMPLING, *changes)
  assert finished.code == 0, finished.stderr
  figures = json.loads(path.read_text())
  assert figures["latents"] == [4, 2, 3, 32]
  lines = finished.stdout.splitlines()
  assert lines[0] == (
    "dc-wan2.1-t2v-1.3b sampling 16 frames of 64x96 on h100, float32"
  )
  table = next(i for i, line in enumerate(lines) if line.startswith("program"))
  rows = [line.split() for line in lines[table + 1 : -2]]
  runs = {" ".join(row[:2]): row[2] for row in rows}
  assert runs == {"text encode": "2", "denoise step": "3", "decode whole": "2"}
  assert lines[-2].endswith("of 72.8 GiB, which fits")
  assert lines[-1].startswith("estimate")


def test_sampling_that_does_not_fit(on_cpu):
  finished = on_cpu(*SAMPLING, "--target=a100", "--config.frames=8")
  assert finished.code == 1
  assert finished.stdout.splitlines()[-1].startswith(
    "does not fit: the weights"
  )


@pytest.mark.parametrize(
  ("target", "code", "verdict"),
  [
    ("h100", 0, "which fits"),
    pytest.param("a100", 1, "which does not fit", marks=pytest.mark.slow),
  ],
)
def test_training(on_cpu, tmp_path, target, code, verdict):
  path = tmp_path / "plan.json"
  finished = on_cpu(
    f"{TRAINING},phase=lora", f"--target={target}", f"--json={path}"
  )
  assert finished.code == code, finished.stderr
  figures = json.loads(path.read_text())
  assert figures["parameters"]["trainable"] > 0
  assert figures["batch"]["deep"] == [8, 3, 2, 2, 64]
  lines = finished.stdout.splitlines()
  assert lines[0].startswith(f"denoise on {target}; compiling")
  peak = figures["bytes"]["peak"] / 2**30
  (row,) = [line for line in lines if line.split()[:1] == ["peak"]]
  assert row.split()[1] == f"{peak:.2f}" and row.endswith(verdict)
  assert lines[-1].startswith("estimated MFU")


@pytest.mark.slow
def test_suggestions(on_cpu, tmp_path):
  path = tmp_path / "plan.json"
  finished = on_cpu(f"{TRAINING},phase=lora", "--suggest", f"--json={path}")
  assert finished.code == 0, finished.stderr
  figures = json.loads(path.read_text())
  assert len(figures["plans"]) == 3
  seconds = [plan["seconds"]["total"] for plan in figures["plans"]]
  best = figures["plans"][seconds.index(min(seconds))]
  assert figures["best"] == best["way"]
  lines = finished.stdout.splitlines()
  starts = [line[:7] for line in lines if " of 3: " in line]
  assert starts == ["1 of 3:", "2 of 3:", "3 of 3:"]
  assert lines[-1].startswith("best: of one device; ")


def test_decoding_says_what_is_over_its_budget(on_cpu, tmp_path):
  path = tmp_path / "plan.json"
  size = ("--height=64", "--width=96", "--dtype=float32", f"--json={path}")
  finished = on_cpu(*size, "--budget_gib=1,2")
  assert finished.code == 0, finished.stderr
  names = [row["budget"] for row in json.loads(path.read_text())]
  assert names == ["1 GiB", "2 GiB", "whole"]


def test_decoding_without_room_is_a_row(on_cpu, monkeypatch):
  monkeypatch.setenv("NO_ROOM", "1")
  size = ("--height=64", "--width=96", "--budget_gib=1", "--decoder=fast")
  finished = on_cpu(*size)
  assert finished.code == 1, finished.stderr
  assert "f32t4c32 (fast decoder) decoding 40 frames" in finished.stdout
  assert finished.stdout.splitlines()[2:] == [
    "1 GiB     does not fit: there is no room",
    "whole     does not fit: there is no room",
  ]


def test_what_jax_refuses_is_one_sentence(on_cpu):
  """cuDNN on a machine without it: jax raises a RuntimeError."""
  changes = ("--config.dtype=bfloat16", "--config.model.attention=cudnn")
  finished = on_cpu(f"{TRAINING},phase=lora", *changes)
  assert finished.code == 2
  assert finished.stderr == (
    "error: cannot be compiled: RuntimeError: cuDNN is not detected.\n"
  )


def test_attention_goes_on_after_what_is_refused(on_cpu, tmp_path):
  path = tmp_path / "plan.json"
  finished = on_cpu("--attention=300", "--blocks=300", f"--json={path}")
  assert finished.code == 1, finished.stderr
  reasons = [
    "cannot be compiled: RuntimeError: cuDNN is not detected.",
    "attention: by_chunks computes at most 256 chunks, found 300",
  ]
  rows = json.loads(path.read_text())
  assert [row["refused"] for row in rows] == 2 * reasons
  for reason in reasons:
    assert finished.stdout.count(f"  cannot be computed: {reason}\n") == 2


@pytest.mark.parametrize(
  ("flag", "value", "named"),
  [("attention", "lots", "tokens"), ("budget_gib", "8,-1", "budget_gib")],
)
def test_numbers_that_are_none(on_cpu, flag, value, named):
  finished = on_cpu(f"--{flag}={value}")
  assert finished.code == 2
  assert finished.stderr == (
    f"error: --{named}: expected positive numbers, found {value!r}\n"
  )


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--model=f32t4c64"], "requirements-cuda.txt"),
    (["--target=v5p:4x4x4", TRAINING], "requirements-tpu.txt"),
    (["--target=v5p:4x4"], "v5p has 3 axes, such as v5p:4x4x4, found v5p:4x4"),
    (["--target=tpu"], "unknown target 'tpu': expected one of h100, h200"),
    ([TRAINING, "--height=64"], "Unknown command line flag 'height'"),
  ],
)
def test_one_sentence(programs, flags, sentence):
  finished = programs.run(
    "launch.plan",
    *flags,
    without=("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13", "libtpu"),
  )
  assert finished.code == 2
  assert finished.stdout == ""
  assert finished.stderr.startswith("error: ")
  assert sentence in finished.stderr
  assert finished.stderr.count("\n") == 1
