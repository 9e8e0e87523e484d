"""Runs programs, each in a fork of this process, which has jax imported.

Reads one JSON request per line from stdin and answers with the exit code. A
fork is a true process, with its own flags, limits and exit, that does not spend
seconds importing.
"""

import json
import os
import pathlib
import resource
import runpy
import signal
import sys

ROOT = str(pathlib.Path(__file__).parents[2])
LONGEST = 300  # seconds

sys.path.insert(0, ROOT)

import dcvideogen_jax.convert  # noqa: E402
import dcvideogen_jax.data.video  # noqa: E402
import dcvideogen_jax.eval.images  # noqa: E402
import dcvideogen_jax.models.streaming  # noqa: E402, F401


class Missing:
  """Makes modules look as if they were not installed."""

  def __init__(self, names):
    self._names = names

  def find_spec(self, name, *_):
    if name in self._names:
      raise ModuleNotFoundError(name)


def main() -> None:
  for line in sys.stdin:
    child = os.fork()
    if child == 0:
      prepare(json.loads(line))
      return
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
  sys.exit()


def prepare(request) -> None:
  """Makes this fork look as if `python -m` had started it."""
  signal.alarm(LONGEST)
  flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
  for stream, number in (("stdout", 1), ("stderr", 2)):
    os.dup2(os.open(request[stream], flags), number)
  os.chdir(request["directory"])
  if request["largest_file"]:
    limits = (request["largest_file"], request["largest_file"])
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  sys.meta_path.insert(0, Missing(request["without"]))
  sys.argv = [request["program"], *request["arguments"]]


main()
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
