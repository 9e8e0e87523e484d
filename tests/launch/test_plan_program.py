"""launch.plan: what it prints, its exit codes, and its one sentence."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.launch import launching

# The program on this machine's CPU, with small models under the released names
# and a GPU that has little memory.
ON_CPU = """
  import dataclasses

  import jax

  from dcvideogen_jax.models import dc_ae_v, umt5, wan_dit
  from dcvideogen_jax.plan import hardware

  dc_ae_v.VARIANTS["f32t4c32"] = {
    "latent_channels": 32,
    "widths": (8, 8, 8, 8, 8, 8, 8),
    "depths": (0, 1, 1, 1, 1, 1, 1),
    "chunk_frames": 8,
  }
  wan_dit.VARIANTS["dc-wan2.1-t2v-1.3b"] |= {
    "layers": 2, "width": 24, "heads": 2, "ffn_width": 32, "text_width": 8
  }
  umt5.VARIANTS["umt5_xxl"] = {
    "vocab": 32, "layers": 1, "width": 8, "heads": 2, "head_width": 4,
    "ffn_width": 16,
  }
  hardware.gpu = lambda name: jax.devices()[0]
  hardware.GPUS["a100"] = dataclasses.replace(
    hardware.GPUS["a100"], memory=1000
  )

  from launch import _program, plan

  _program.run(plan.main)
"""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
  directory = tmp_path_factory.mktemp("plan")
  path = directory / "prog.py"
  path.write_text(textwrap.dedent(ON_CPU))

  def run(*flags):
    finished = subprocess.run(
      [sys.executable, path, "--dtype=float32", *flags],
      env={
        **os.environ,
        "PYTHONPATH": str(launching.ROOT),
        "HOME": str(directory),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
      },
      capture_output=True,
      text=True,
    )
    return launching.Finished(
      finished.returncode, finished.stdout, finished.stderr
    )

  return run


SAMPLING = ("--model=dc-wan2.1-t2v-1.3b", "--height=64", "--width=96")


def test_sampling_that_fits(on_cpu, tmp_path):
  path = tmp_path / "plan.json"
  finished = on_cpu(*SAMPLING, "--frames=16", "--steps=3", f"--json={path}")
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
  finished = on_cpu(*SAMPLING, "--target=a100", "--frames=8")
  assert finished.code == 1
  assert finished.stdout.splitlines()[-1].startswith(
    "does not fit: the weights"
  )


def test_decoding_says_what_is_over_its_budget(on_cpu, tmp_path):
  path = tmp_path / "plan.json"
  size = ("--height=64", "--width=96", f"--json={path}")
  finished = on_cpu(*size, "--budget_gib=1,2")
  assert finished.code == 0, finished.stderr
  names = [row["budget"] for row in json.loads(path.read_text())]
  assert names == ["1 GiB", "2 GiB", "whole"]


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--model=dc-wan2.1-t2v-14b"], "requirements-cuda.txt"),
    (["--frames=40"], "--frames is not for f32t4c32, an autoencoder"),
    (
      ["--model=wan2.1-t2v-1.3b", "--budget_gib=8"],
      "--budget_gib is for autoencoders, and wan2.1-t2v-1.3b is none",
    ),
  ],
)
def test_one_sentence(programs, flags, sentence):
  finished = programs.run(
    "launch.plan",
    *flags,
    without=("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
  )
  assert finished.code == 2
  assert finished.stdout == ""
  assert finished.stderr.startswith("error: ")
  assert sentence in finished.stderr
  assert finished.stderr.count("\n") == 1
