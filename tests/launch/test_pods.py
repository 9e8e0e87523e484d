"""launch/sky.yaml and docs/pods.md by the parsers of SkyPilot and xpk.

`make test-pods` runs these in an environment that has both and not jax, so
nothing of this project is imported.
"""

import argparse
import os
import pathlib
import re
import shlex
import subprocess

import pytest

pytestmark = pytest.mark.pods
ROOT = pathlib.Path(__file__).parents[2]
TASK = ROOT / "launch" / "sky.yaml"
DOCS = (ROOT / "docs" / "pods.md").read_text()
WORKDIR = ("WORKDIR", "gs://bucket/run")


def load(*envs):
  import sky

  config = sky.utils.yaml_utils.read_yaml(str(TASK))
  return sky.Task.from_yaml_config(config, env_overrides=[*envs])


def commands(program):
  """The command lines of a program in the documentation, as lists."""
  blocks = re.findall(r"^```bash\n(.*?)^```", DOCS, re.M | re.S)
  lines = "".join(blocks).replace("\\\n", " ").splitlines()
  return [shlex.split(x) for x in lines if x.startswith(f"{program} ")]


def flags_of(program):
  """Names of the flags that a program of this project defines."""
  folder = ROOT / "dcvideogen_jax" / "programs"
  texts = [
    (folder / f"{name}.py").read_text()
    for name in (program, "common", "distributed")
  ]
  return set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", "".join(texts)))


def test_the_task_is_a_spot_slice():
  from sky.clouds.utils import gcp_utils

  (resources,) = load(WORKDIR).resources
  assert resources.use_spot
  # SkyPilot runs the task on every host of what it takes for a pod.
  assert gcp_utils.is_tpu_vm_pod(resources)
  # 4x4x4 chips of two cores.
  config = TASK.read_text().split("CONFIG: ")[1].splitlines()[0]
  assert config.endswith("target=v5p_4x4x4")
  assert resources.accelerators == {"tpu-v5p-128": 1}


def test_the_folder_of_the_run_has_to_be_given():
  with pytest.raises(ValueError, match="'WORKDIR' is None"):
    load()


@pytest.mark.parametrize(
  ("codes", "again"),
  [
    ([143], True),
    ([134, 137], True),
    # One process ended; SkyPilot ends the others with 137.
    ([2, 137], False),
    ([1, 137], False),
  ],
)
def test_what_is_recovered(codes, again):
  """By SkyPilot's own rule on the exit codes of all hosts."""
  from sky.jobs import recovery_strategy

  (resources,) = load(WORKDIR).resources
  recovery = dict(resources.job_recovery)
  rule = object.__new__(recovery_strategy.StrategyExecutor)
  rule.recover_on_exit_codes = recovery["recover_on_exit_codes"]
  rule.max_restarts_on_errors = recovery.get("max_restarts_on_errors", 0)
  rule.restart_cnt_on_failure = 0
  assert rule.should_restart_on_failure(codes) == again


def test_the_task_runs_a_training(tmp_path):
  """Its shell scripts, with stand-ins for uv and Python."""
  (tmp_path / "bin").mkdir()
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  for name, text in {
    "bin/uv": 'echo "$@" >>installed',
    ".venv/bin/python": 'printf "%s\\n" "$@"; exit 143',
  }.items():
    (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  task = load(WORKDIR, ("FLAGS", "--config.save_every=200 --profile=1-2"))
  environment = os.environ | task.envs
  environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
  run = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert subprocess.run(["bash", "-c", task.setup], **run).returncode == 0
  for name in re.findall(
    "requirements\\S+", (tmp_path / "installed").read_text()
  ):
    assert (ROOT / name).exists()
  finished = subprocess.run(["bash", "-c", task.run], **run)
  assert finished.returncode == 143, finished.stderr
  assert finished.stdout.splitlines() == [
    *("-u", "-m", "launch.train", f"--config={task.envs['CONFIG']}"),
    *("--workdir=gs://bucket/run", "--compile_cache=gs://bucket/run/xla"),
    *("--config.save_every=200", "--profile=1-2", "--distributed"),
  ]
  given = set(re.findall(r"--(\w+)[=\n]", finished.stdout))
  assert given <= flags_of("train")


def test_sky_commands():
  """Those of the documentation, by SkyPilot's command line."""
  from sky.client.cli import command

  found = commands("sky")
  assert len(found) >= 3
  for line in found:
    group, context = command.cli, None
    words = line[1:]
    while hasattr(group, "commands"):
      name = words.pop(0)
      group = group.commands[name]
    context = group.make_context(name, words)
    if line[1:3] == ["jobs", "launch"]:
      assert context.params["entrypoint"] == ("launch/sky.yaml",)
      load(*context.params["env"])


def test_xpk_commands():
  from xpk.parser import core

  parser = argparse.ArgumentParser(prog="xpk")
  core.set_parser(parser)
  found = commands("xpk")
  assert len(found) >= 4
  for line in found:
    # It exits where a flag is not known or one is missing.
    parsed = parser.parse_args(line[1:])
    if line[1:3] == ["workload", "create"]:
      words = shlex.split(parsed.command)
      assert words[:4] == ["exec", "python", "-m", "launch.train"]
      given = {x.lstrip("-").partition("=")[0] for x in words[4:]}
      assert "distributed" in given and given <= flags_of("train")


def test_xpk_starts_again_what_may_be():
  from xpk.commands import workload

  for given in (None, "1"):
    codes = workload.get_restart_exit_codes(
      argparse.Namespace(restart_on_exit_codes=given)
    )
    assert {134, 137, 143} <= {*codes} and 2 not in codes
    assert (1 in codes) == (given is not None)
