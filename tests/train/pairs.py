"""Two processes on this machine that train together."""

import pathlib
import socket
import subprocess
from collections.abc import Sequence

from tests.train import killing


def start(
  command: Sequence[str], cache: pathlib.Path
) -> list[subprocess.Popen[str]]:
  """Both, with arguments as for `killing.start`."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  together = [f"--coordinator=localhost:{port}", "--processes=2"]
  return [
    killing.start([*command, *together, f"--process={i}"], cache)
    for i in range(2)
  ]


def finish(
  processes: Sequence[subprocess.Popen[str]],
) -> list[tuple[int, str, str]]:
  """Waits for both; as `killing.finish`."""
  return [killing.finish(process) for process in processes]
