"""launch/tpu_pod.sh against two workers that are directories."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch import launching

SLICE = ("--name=pod", "--zone=z", "--target=v5e:4x4")


class Pod:
  """A slice, and what its workers do at their first, second ... start."""

  def __init__(self, checkout: pathlib.Path, directory: pathlib.Path):
    self.checkout, self.directory = checkout, directory
    self.acts(["true"] * 9, ["true"] * 9)
    (directory / "calls").touch()

  def read(self, name):
    return (self.directory / name).read_text().splitlines()

  def acts(self, *workers):
    for i, lines in enumerate(workers):
      (self.directory / f"acts{i}").write_text("\n".join(lines) + "\n")

  def starts(self):
    paths = [self.directory / f"starts{i}" for i in range(2)]
    return [len(x.read_text().split()) if x.exists() else 0 for x in paths]

  def calls(self, word):
    return [line for line in self.read("calls") if f" {word} " in line]

  def start(self, *arguments):
    fakes = pathlib.Path(__file__).parent / "pod"
    return subprocess.Popen(
      [self.checkout / "launch" / "tpu_pod.sh", *arguments],
      env=os.environ
      | {
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "POD": str(self.directory),
        "TPU_POD_PAUSE": "0.1",
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *arguments):
    process = self.start(*arguments)
    stdout, stderr = process.communicate(timeout=60)
    return launching.Finished(process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """A small one that has the script."""
  directory = tmp_path_factory.mktemp("checkout")
  (directory / "launch").mkdir()
  shutil.copy(launching.ROOT / "launch" / "tpu_pod.sh", directory / "launch")
  git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
  for command in (["init"], ["add", "."], ["commit", "-m", "one"]):
    subprocess.run([*git, *command], cwd=directory, check=True)
  return directory


@pytest.fixture
def pod(checkout, tmp_path):
  yield Pod(checkout, tmp_path)
  for path in tmp_path.glob("worker?/dcvideogen_jax/pid"):
    try:
      os.kill(int(path.read_text()), signal.SIGKILL)
    except ProcessLookupError:
      pass


def test_creates_installs_and_runs_then_reuses(pod):
  """With flags as they were given, and the documented example."""
  (pod.directory / "refusals").write_text("ERROR: no more capacity\n")
  program = ("train", "--workdir=gs://b/run", "--config.x=a 'b' $c")
  finished = pod.run(*SLICE, "--project=p", "--spot", "--", *program)
  assert finished.code == 0, finished.stderr
  assert sorted(finished.stdout.splitlines()) == [
    f"worker {i}, start 1" for i in range(2)
  ]
  refused, created = pod.calls("create")
  assert (
    refused
    == created
    == (
      "compute tpus tpu-vm create pod --accelerator-type=v5litepod-16"
      " --version=v2-alpha-tpuv5-lite --spot --zone=z --project=p"
    )
  )
  assert "no more capacity" in finished.stderr
  for worker in range(2):
    assert pod.read(f"arguments{worker}") == [
      *("-u", "-m", "launch.train", *program[1:], "--distributed")
    ]
    home = pod.directory / f"worker{worker}" / "dcvideogen_jax"
    assert len(list(home.glob("*/launch/tpu_pod.sh"))) == 1
  assert all("requirements-tpu.txt" in line for line in pod.read("installed"))
  text = (launching.ROOT / "docs" / "pods.md").read_text()
  (command,) = re.findall(r"^launch/tpu_pod.sh (.*?)^```", text, re.M | re.S)
  again = pod.run(*shlex.split(command.replace("\\\n", "")), "--name=pod")
  assert again.code == 0, again.stderr
  assert pod.starts() == [2, 2]
  assert len(pod.calls("create")) == len(pod.read("installed")) == 2


def test_a_preempted_slice_is_made_again(pod):
  preempt = 'echo PREEMPTED >"$POD/state"; exit 1'
  pod.acts([preempt, "true"], ["exit 134", "true"])
  finished = pod.run(*SLICE, "--", "train")
  assert finished.code == 0, finished.stderr
  assert len(pod.calls("create")) == 2 and len(pod.calls("delete")) == 1
  assert pod.starts() == [2, 2] and len(pod.read("installed")) == 4


@pytest.mark.parametrize("codes", [(143, 134), (0, 255)])
def test_what_was_told_to_stop_or_lost_is_started_again(pod, codes):
  pod.acts(*([f"exit {code}", "true"] for code in codes))
  finished = pod.run(*SLICE, "--", "train")
  assert finished.code == 0, finished.stderr
  assert pod.starts() == [2, 2] and len(pod.calls("create")) == 1


@pytest.mark.parametrize("code", [1, 2])
def test_other_failures_are_not_tried_again(pod, code):
  pod.acts(["true"], [f"echo 'error: no steps' >&2; exit {code}"])
  finished = pod.run(*SLICE, "--", "train")
  assert finished.code == code and "error: no steps" in finished.stderr
  assert pod.starts() == [1, 1]


def test_what_still_runs_is_ended_first(pod):
  """As after the script was killed: two would write to one folder."""
  pod.acts(["wait_for_term", "true"], ["wait_for_term", "true"])
  first = pod.start(*SLICE, "--", "train")
  end = time.monotonic() + 60
  while pod.starts() != [1, 1]:
    assert time.monotonic() < end
    time.sleep(0.05)
  first.kill()
  finished = pod.run(*SLICE, "--", "train")
  first.communicate()
  assert finished.code == 0, finished.stderr
  assert pod.read("order0") == ["start 1", "saving", "start 2"]


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--zone=z", "--", "train"], "--name and --zone are needed"),
    ([*SLICE], "which program? It comes after --"),
    ([*SLICE, "--target=v7:4x4", "--", "train"], "found 'v7:4x4'"),
  ],
)
def test_bad_options_are_told_in_one_sentence(pod, arguments, sentence):
  finished = pod.run(*arguments)
  assert finished.code == 2 and not finished.stdout
  assert finished.stderr.startswith("error: ") and sentence in finished.stderr
  assert finished.stderr.count("\n") == 1 and not pod.read("calls")
