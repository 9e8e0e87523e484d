"""Completion of programs, flags and values, and the shells' scripts."""

import os
import shutil
import subprocess
import sys

import pytest

from dcvideogen_jax.programs import cli, completion
from tests.launch import launching

DCVIDEOGEN = f"""#!/bin/sh
exec {sys.executable} -c \
'from dcvideogen_jax.programs import cli; cli.main()' "$@"
"""


def ask(*words):
  """Candidates; a process of its own, as programs define the same flags."""
  code = "from dcvideogen_jax.programs import cli; cli.main()"
  finished = subprocess.run(
    [sys.executable, "-c", code, "completion", "candidates", *words],
    cwd=launching.ROOT,
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0 and not finished.stderr
  return finished.stdout.split()


@pytest.mark.parametrize(
  ("words", "found"),
  [
    (["sam"], ["sample"]),
    (["pl"], ["plan"]),
    (["plan", ""], ["attention", "decode", "sample", "train"]),
    (["plan", "t"], ["train"]),
    (["evaluate", "v"], ["vbench-folder"]),
    (["nothing", ""], []),
    (["sample", "file"], []),
  ],
)
def test_programs(words, found):
  assert completion.candidates(words, cli.PROGRAMS) == found


def test_all_programs():
  found = completion.candidates([""], cli.PROGRAMS)
  assert found == sorted({name.split()[0] for name in cli.PROGRAMS})
  assert completion.candidates([], cli.PROGRAMS) == found


@pytest.mark.parametrize(
  ("words", "found"),
  [
    (["sample", "--prom"], ["--prompt=", "--prompts="]),
    (
      ["sample", "--crf=1", "--config=tin"],
      ["--config=tiny", "--config=tiny-i2v"],
    ),
    (["sample", "--config.mesh.co"], ["--config.mesh.context="]),
    (["convert", "--to=d"], ["--to=diffusers"]),
    (["plan", "decode", "--whol"], ["--whole"]),
    (["evaluate", "tiny", "--compile"], ["--compile_cache="]),
    (["convert", "--prompt"], []),
  ],
)
def test_flags_and_values(words, found):
  assert ask(*words) == found


def bash(tmp_path, line):
  """What bash offers for the end of a command line."""
  path = tmp_path / "dcvideogen"
  path.write_text(DCVIDEOGEN)
  path.chmod(0o755)
  code = f"""
source <(dcvideogen completion bash)
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
_dcvideogen
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p dcvideogen
"""
  finished = subprocess.run(
    ["bash", "-c", code],
    env={
      **os.environ,
      "PATH": f"{tmp_path}:{os.environ['PATH']}",
      "PYTHONPATH": str(launching.ROOT),
    },
    capture_output=True,
    text=True,
  )
  *found, registered = finished.stdout.splitlines()
  assert registered == "complete -o default -F _dcvideogen dcvideogen"
  return found


@pytest.mark.parametrize(
  ("line", "found"),
  [
    ("dcvideogen reco", ["reconstruct"]),
    ("dcvideogen plan ", ["attention", "decode", "sample", "train"]),
    # What follows "=" is a word of its own.
    ("dcvideogen convert --kind=w", ["wan_dit", "wan_vae"]),
  ],
)
def test_bash(tmp_path, line, found):
  assert bash(tmp_path, line) == found


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
def test_zsh_reads_its_script():
  script = completion.SCRIPTS["zsh"]
  subprocess.run(["zsh", "-n"], input=script, text=True, check=True)


def test_another_shell_is_refused(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["dcvideogen", "completion", "fish"])
  with pytest.raises(SystemExit) as ended:
    cli.main()
  assert ended.value.code == 2
  assert capsys.readouterr().err == (
    "error: expected bash or zsh, found 'fish'\n"
  )
