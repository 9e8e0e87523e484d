"""The doctor: this machine, and a GPU that is not here."""

import json
import os
import subprocess
import sys
import textwrap
import types

import jax
import pytest

from dcvideogen_jax import errors, files
from dcvideogen_jax.plan import hardware, machine, tables, tpus
from tests import compiling
from tests.launch import launching

GIB = 2**30
H100 = hardware.GPUS["h100"]


def pretended(kind=H100.kind, platform="gpu", used=GIB):
  limit = {"bytes_limit": H100.usable, "bytes_in_use": used}
  return types.SimpleNamespace(
    device_kind=kind, platform=platform, memory_stats=lambda: limit
  )


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))
  for name, size in (("xla/a", 1000), ("xla/b/c", 500), ("media/d", 30)):
    path = tmp_path / "cache" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
  (tmp_path / "cache" / "xla" / "link").symlink_to(path)
  return tmp_path / "cache"


def test_this_machine(cache):
  found = machine.report(jax.devices())
  by_name = {row["name"]: row for row in found["packages"]}
  wanted = (launching.ROOT / "requirements.txt").read_text().splitlines()
  named = [x for x in wanted if x and not x.startswith("#")]
  required = [row for row in found["packages"] if not row["purpose"]]
  assert len(required) == len(named)
  assert by_name["jax"]["version"] == jax.__version__
  assert by_name["etils"]["needs"].startswith(">=")
  assert found["devices"]["platform"] == "cpu"
  assert found["devices"]["count"] == len(jax.devices())
  assert found["devices"]["limit_bytes"] is None
  assert 0 < found["host"]["free_bytes"] < found["host"]["memory_bytes"]
  caches = {row["what"]: row for row in found["caches"]}
  assert caches["compiled programs"]["path"] == str(cache / "xla")
  assert caches["compiled programs"]["bytes"] == 1500
  assert caches["compiled programs"]["files"] == 2
  assert caches["media"]["bytes"] == 30
  assert caches["models of Hugging Face"]["free_bytes"] > 0
  assert found["problems"] == []
  assert json.loads(json.dumps(found)) == found


def test_a_pretended_gpu(monkeypatch):
  monkeypatch.setenv("PATH", "")  # No nvidia-smi.
  found = machine.report([pretended(), pretended()])
  assert found["devices"] == {
    "kind": H100.kind,
    "platform": "gpu",
    "count": 2,
    "limit_bytes": H100.usable,
    "free_bytes": H100.usable - GIB,
  }
  assert "  2 of NVIDIA H100 80GB HBM3 (gpu), 71.8 GiB free of the 72.8" in (
    tables.machine(found)
  )
  device = machine.device([pretended()])
  assert device == machine.target("h100")
  other = machine.device([pretended("NVIDIA T4")])
  assert other.flops == {} and other.limit == H100.usable


def test_the_driver_knows_what_other_programs_take(monkeypatch):
  told = types.SimpleNamespace(stdout="2048 MiB\n")
  monkeypatch.setattr(subprocess, "run", lambda *args, **options: told)
  found = machine.report([pretended()])
  assert found["devices"]["free_bytes"] == 2 * GIB


def test_targets():
  assert machine.target("v5e").limit == tpus.TPUS["v5e"].usable
  assert machine.target("v5e").platform == "tpu"
  with pytest.raises(errors.UserError, match="--target must be one of h100"):
    machine.target("h10")


@pytest.mark.parametrize(
  ("version", "needs", "will_do"),
  [
    ("0.10.2", ">=0.10.2", True),
    ("0.10.10", ">=0.10.2", True),
    ("0.9.30", ">=0.10.2", False),
    ("9.0", ">=9", True),
    ("0.10.2+cuda", ">=0.10.2", True),
    ("6.31.0", "==6.31.0", True),
    ("6.31.1", "==6.31.0", False),
    ("1", "", True),
  ],
)
def test_versions_that_will_do(version, needs, will_do):
  assert machine.satisfies(version, needs) == will_do


def test_what_is_to_mend(monkeypatch, tmp_path):
  driver = tmp_path / "version"
  driver.touch()
  monkeypatch.setattr(
    machine, "_DRIVERS", {"gpu": (str(driver), "no GPU is seen")}
  )
  versions = {"jax": "0.9.1", "flax": None}
  found = machine._version
  monkeypatch.setattr(
    machine, "_version", lambda name: versions.get(name, found(name))
  )
  problems = machine.report(jax.devices())["problems"]
  assert problems == [
    "jax is 0.9.1, expected >=0.10.2: pip install 'jax>=0.10.2'",
    "flax is not installed: pip install 'flax>=0.12.8'",
    "no GPU is seen",
  ]
  assert machine.report([pretended()])["problems"] == problems[:2]


# The program, where jax says that there is a GPU.
PRETENDED = """
  import runpy
  import types

  import jax

  from dcvideogen_jax.plan import fits

  fits.rows.__defaults__ = (("dc-t2v-14b",), ("480p", "720p"))
  limit = {"bytes_limit": 78147540746, "bytes_in_use": 0}
  gpu = types.SimpleNamespace(
    device_kind="NVIDIA H100 80GB HBM3",
    platform="gpu",
    memory_stats=lambda: limit,
  )
  jax.devices = lambda: [gpu]
  runpy.run_module("launch.doctor", run_name="__main__")
"""


def test_the_program(tmp_path):
  path = tmp_path / "pretended.py"
  path.write_text(textwrap.dedent(PRETENDED))
  finished = subprocess.run(
    [sys.executable, path, "--json"],
    env={
      **os.environ,
      "PYTHONPATH": str(launching.ROOT),
      "HOME": str(tmp_path),
      "PATH": "",
      "XLA_FLAGS": compiling.FLAGS,
    },
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr
  found = json.loads(finished.stdout)
  assert found["devices"]["kind"] == H100.kind
  rows = {row["config"]: row for row in found["fits"]["rows"]}
  assert found["fits"]["dtype"] == "bfloat16"
  assert rows["dc-t2v-14b,size=720p"]["flags"] == []
  assert rows["dc-t2v-14b,size=720p"]["step_seconds"] > 1
