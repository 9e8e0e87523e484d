"""What programs on several processes share, tried with a small one."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from tests.launch import launching

PROGRAM = """
  import sys
  import time

  from absl import flags

  from dcvideogen_jax import errors, memory
  from dcvideogen_jax.programs import distributed, common

  _DO = flags.DEFINE_string("do", "", "What happens.")


  def main(argv):
    index, count = distributed.share()
    print(f"process {index} of {count}", flush=True)
    match _DO.value:
      case "user_error":
        raise errors.UserError("this is wrong")
      case "one_user_error":
        if index == 1:
          raise errors.UserError("this is wrong")
        distributed.wait()  # For ever, in the middle of a computation.
      case "one_bug":
        if index == 0:
          raise ValueError("a bug")
        distributed.wait()
      case "wait":
        print("ready", file=sys.stderr, flush=True)
        time.sleep(600)
    memory.free = lambda: 2**40 - 2**20 * index
    with common.output_directory(f"out/{index}") as directory:
      (directory / "file").write_text("x")
      distributed.wait()
    print(memory.free_on_all(), file=sys.stderr)


  if __name__ == "__main__":
    common.run(main)
"""


@pytest.fixture
def place(tmp_path):
  (tmp_path / "prog.py").write_text(textwrap.dedent(PROGRAM))
  return tmp_path


def start(place, *flags):
  return subprocess.Popen(
    [sys.executable, "prog.py", *flags],
    cwd=place,
    env=os.environ
    | {
      "PYTHONPATH": str(launching.ROOT),
      "XDG_CACHE_HOME": str(place),
      "XLA_FLAGS": "",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_pair(place, *flags):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  joining = [f"--coordinator=localhost:{port}", "--processes=2"]
  return [start(place, *flags, *joining, f"--process={i}") for i in range(2)]


def finish(*processes):
  ended = []
  for process in processes:
    stdout, stderr = process.communicate(timeout=300)
    ended.append(launching.Finished(process.returncode, stdout, stderr))
  return ended


def test_process_0_speaks_and_writes(place):
  first, second = finish(*start_pair(place))
  assert (first.code, second.code) == (0, 0), (first, second)
  # Of a CPU, jax's own library for collectives speaks too.
  said = [re.sub(r"\[Gloo\].*\n", "", x.stdout) for x in (first, second)]
  assert said == ["process 0 of 2\n", ""]
  assert [x.name for x in (place / "out").iterdir()] == ["0"]
  assert (place / "out" / "0" / "file").read_text() == "x"
  least = f"{2**40 - 2**20}\n"
  assert (first.stderr, second.stderr) == (least, least)


def test_all_tell_what_is_wrong_and_end_alike(place):
  for ended in finish(*start_pair(place, "--do=user_error")):
    assert (ended.code, ended.stderr) == (2, "error: this is wrong\n")


@pytest.mark.parametrize(
  ("do", "guilty", "code", "last"),
  [
    ("one_user_error", 1, 2, "this is wrong"),
    ("one_bug", 0, 1, "ValueError: a bug"),
  ],
)
def test_one_that_fails_ends_the_other(place, do, guilty, code, last):
  """Which waits for it, and would for minutes."""
  start_time = time.monotonic()
  ended = finish(*start_pair(place, f"--do={do}"))
  assert time.monotonic() - start_time < 45
  assert [x.code for x in ended] == [code, code], ended
  assert ended[1 - guilty].stderr == f"error: process {guilty}: {last}\n"
  assert ended[guilty].stderr.endswith(f"error: {last}\n")
  assert ("Traceback" in ended[guilty].stderr) == (code == 1)


def test_sigterm_ends_what_does_not_save(place):
  pair = start_pair(place, "--do=wait")
  for process in pair:
    assert process.stderr.readline() == "ready\n"
  for process in pair:
    process.send_signal(signal.SIGTERM)
  assert [ended.code for ended in finish(*pair)] == [143, 143]


@pytest.mark.parametrize(
  ("flags", "code", "words"),
  [
    (["--processes=3", "--process=2"], 0, "process 2 of 3"),
    (["--processes=2"], 0, "process 0 of 2"),
    (["--process=1"], 2, "--process must be below --processes=1, not 1"),
    (["--coordinator=localhost:1", "--process=0"], 2, "belong together"),
    (
      ["--coordinator=host", "--processes=2", "--process=0"],
      2,
      "--coordinator must be host:port and --process within 0..1, found host",
    ),
    (["--distributed"], 2, "cannot join the other processes: coordinator"),
  ],
)
def test_alone(place, flags, code, words):
  (ended,) = finish(start(place, *flags))
  assert ended.code == code, ended.stderr
  assert words in (ended.stderr if code else ended.stdout)
  assert len(ended.stderr.splitlines()) <= 1
