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

SLICE = ("--name=pod", "--zone=z", "--target=v5e:4x4", "--poll=0.3")


class Pod:
  """A slice, and what its workers do at their first, second ... start."""

  def __init__(self, checkout: pathlib.Path, directory: pathlib.Path):
    self.checkout, self.directory = checkout, directory
    self.acts(["true"] * 9, ["true"] * 9)
    self.write("topology", "4x4")
    self.write("calls", "")

  def write(self, name, text):
    (self.directory / name).write_text(text + "\n")

  def read(self, name):
    return (self.directory / name).read_text().splitlines()

  def acts(self, worker0, worker1):
    self.write("acts0", "\n".join(worker0))
    self.write("acts1", "\n".join(worker1))

  def starts(self):
    found = [self.directory / f"starts{i}" for i in range(2)]
    return [len(x.read_text().split()) if x.exists() else 0 for x in found]

  def calls(self, word):
    return [line for line in self.read("calls") if word in line]

  def start(self, *arguments):
    fakes = pathlib.Path(__file__).parent / "pod"
    return subprocess.Popen(
      [self.checkout / "launch" / "tpu_pod.sh", *arguments],
      env=os.environ
      | {
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "POD": str(self.directory),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *arguments):
    process = self.start(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    return launching.Finished(process.returncode, stdout, stderr)

  def wait_for(self, condition):
    for _ in range(600):
      if condition():
        return
      time.sleep(0.1)
    raise AssertionError(f"waited in vain: {self.read('calls')[-3:]}")


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
  made = Pod(checkout, tmp_path)
  yield made
  for path in tmp_path.glob("worker?/dcvideogen_jax/run/pid"):
    try:
      os.killpg(int(path.read_text()), signal.SIGKILL)
    except ProcessLookupError:
      pass


def test_creates_installs_and_runs_then_reuses(pod):
  program = ("train", "--workdir=gs://b/run", "--config.x=a 'b' $c")
  finished = pod.run(*SLICE, "--project=p", "--spot", "--", *program)
  assert finished.code == 0, finished.stderr
  assert finished.stdout.splitlines() == ["worker 0, start 1"]
  (created,) = pod.calls(" create ")
  assert created == (
    "compute tpus tpu-vm create pod --version=v2-alpha-tpuv5-lite"
    " --accelerator-type=v5litepod-16 --spot --zone=z --project=p"
  )
  for worker in range(2):
    assert pod.read(f"arguments{worker}") == [
      *("-m", "launch.train", *program[1:], "--distributed")
    ]
    home = pod.directory / f"worker{worker}" / "dcvideogen_jax"
    assert len(list(home.glob("*/launch/tpu_pod.sh"))) == 1
  assert all("requirements-tpu.txt" in line for line in pod.read("installed"))
  again = pod.run(*SLICE, "--", *program)
  assert again.code == 0, again.stderr
  assert len(pod.calls(" create ")) == len(pod.calls(" scp ")) == 1
  assert pod.starts() == [2, 2] and len(pod.read("installed")) == 2


@pytest.mark.parametrize("kind", ["tpu-vm", "queued-resources"])
def test_a_preempted_slice_is_made_again(pod, kind):
  preempt = 'echo PREEMPTED >"$POD/state"; wait_for_term'
  pod.acts([preempt, "true"], ["wait_for_term", "true"])
  queued = ["--queued"] if kind == "queued-resources" else []
  finished = pod.run(*SLICE, *queued, "--retries=0", "--", "train")
  assert finished.code == 0, finished.stderr
  assert "worker 0, start 2" in finished.stdout
  assert len(pod.calls(f"{kind} create pod ")) == 2
  assert len(pod.calls(f"{kind} delete pod ")) == 1
  assert len(pod.calls(" scp ")) == 2 and pod.starts() == [2, 2]


def test_a_slice_that_failed_is_not_made_again(pod):
  (pod.directory / "state").write_text("FAILED")
  finished = pod.run(*SLICE, "--queued", "--", "train")
  assert finished.code == 2 and "pod has failed" in finished.stderr
  assert not pod.calls(" delete ") and not pod.calls(" create ")


def test_what_was_told_to_stop_is_started_again(pod):
  """As by maintenance: one gets the signal, the other one loses its partner."""
  pod.acts(["exit 143", "true"], ["exit 134", "true"])
  finished = pod.run(*SLICE, "--retries=0", "--", "train")
  assert finished.code == 0, finished.stderr
  assert pod.starts() == [2, 2] and len(pod.calls(" create ")) == 1


def test_bad_input_is_not_tried_again(pod):
  pod.acts(["wait_for_term"], ["sleep 0.3; echo 'error: no steps'; exit 2"])
  finished = pod.run(*SLICE, "--", "train")
  assert finished.code == 2
  assert "error: no steps" in finished.stderr
  assert finished.stderr.splitlines()[-1].startswith("error: the program ref")
  assert pod.starts() == [1, 1]
  # The other one was ended, and not left waiting.
  log = pod.directory / "worker0" / "dcvideogen_jax" / "run" / "log"
  assert log.read_text().splitlines()[-1] == "saving"


def test_other_failures_are_tried_again_a_few_times(pod):
  crash = "sleep 0.2; echo Traceback; exit 1"
  pod.acts(["wait_for_term"] * 2, [crash] * 2)
  finished = pod.run(*SLICE, "--retries=1", "--", "train")
  assert finished.code == 1
  assert finished.stderr.count("Traceback") == 2
  assert pod.starts() == [2, 2]


def test_a_crash_that_does_not_repeat(pod):
  pod.acts(["kill -9 $$", "true"], ["true", "true"])
  finished = pod.run(*SLICE, "--retries=1", "--", "train")
  assert finished.code == 0, finished.stderr
  assert pod.starts() == [2, 2]


@pytest.mark.parametrize(
  ("refusals", "code"),
  [
    (["ERROR: There is no more capacity in the zone"] * 2, 0),
    (["ERROR: Quota limit 'TPUV5sLitepod' has been exceeded"], 2),
  ],
)
def test_waits_for_room_only(pod, refusals, code):
  (pod.directory / "refusals").write_text("\n".join(refusals) + "\n")
  finished = pod.run(*SLICE, "--delete", "--", "train")
  assert finished.code == code
  assert refusals[0] in finished.stderr
  assert len(pod.calls(" create ")) == len(refusals) + (code == 0)
  assert len(pod.calls(" delete ")) == (code == 0)


def test_the_program_outlives_the_script(pod):
  pod.acts(["wait_for_term"], ["wait_for_term"])
  first = pod.start(*SLICE, "--", "train")
  pod.wait_for(lambda: pod.starts() == [1, 1])
  first.kill()
  first.communicate()
  taken = pod.run(*SLICE, "--", "sample")
  assert taken.code == 2
  assert "something else runs here" in taken.stderr
  attached = pod.start(*SLICE, "--retries=0", "--", "train")
  pod.acts(["", "true"], ["", "true"])
  pod.wait_for(lambda: pod.calls("tail -c")[1:])
  assert pod.run(*SLICE[:2], "--stop").code == 0
  stdout, stderr = attached.communicate(timeout=60)
  assert attached.returncode == 0, stderr
  assert stdout.splitlines()[0] == "worker 0, start 1"
  assert "saving" in stdout
  assert pod.starts() == [2, 2]


def test_a_dry_run_only_prints(pod):
  options = (*SLICE[:2], "--target=v5p:4x4x4", "--queued", "--dry_run")
  finished = pod.run(*options, "--delete", "--", "train", "--workdir=w")
  assert finished.code == 0, finished.stderr
  assert pod.read("calls") == [""]
  lines = finished.stdout.splitlines()
  assert all(line.startswith("gcloud compute tpus ") for line in lines)
  order = ["create", "scp", ".installed", "setsid", "tail", "lost", "delete"]
  found = [next(i for i, x in enumerate(lines) if w in x) for w in order]
  assert found == sorted(found)
  assert "--accelerator-type=v5p-128" in lines[0]
  assert "--runtime-version=v2-alpha-tpuv5 " in lines[0]


def test_the_documented_command(pod):
  text = (launching.ROOT / "docs" / "pods.md").read_text()
  (command,) = re.findall(r"^launch/tpu_pod.sh (.*?)^```", text, re.M | re.S)
  arguments = shlex.split(command.replace("\\\n", ""))
  finished = pod.run("--dry_run", *arguments)
  assert finished.code == 0, finished.stderr
  assert "--accelerator-type=v5p-128" in finished.stdout
  programs = (launching.ROOT / "launch").glob("*.py")
  sources = "".join(path.read_text() for path in programs)
  flags = re.findall(r"--(\w+)=", command.partition(" -- ")[2])
  assert {"config", "workdir"} <= set(flags)
  for flag in flags:
    assert re.search(rf"DEFINE_\w+\(\s*\"{flag}\"", sources), flag


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--zone=z"], "--name and --zone are needed"),
    ([*SLICE, "--spott"], "there is no option --spott: the program comes"),
    ([*SLICE], "which program? It comes after --"),
    ([*SLICE, "--poll=x", "--", "train"], "--retries and --poll are numbers"),
    ([*SLICE, "--target=v7:4x4", "--", "train"], "found 'v7:4x4'"),
    ([*SLICE, "--target=v6e:2x4", "--", "train"], "topology 4x4, expected 2x4"),
  ],
)
def test_bad_options_are_told_in_one_sentence(pod, arguments, sentence):
  finished = pod.run(*arguments)
  assert finished.code == 2 and not finished.stdout
  assert finished.stderr.startswith(("error: ", "tpu_pod: "))
  assert sentence in finished.stderr.splitlines()[-1]
  assert pod.starts() == [0, 0]
