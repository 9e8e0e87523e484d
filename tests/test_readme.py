"""The README's commands run, in order, in a copy of the checkout.

A block is run if the line above it is `<!-- test -->`. The others have to name
programs and flags that exist.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
COPIED = ("benchmarks", "configs", "dcvideogen_jax", "launch", "docs")
LONGEST = 600  # seconds
RUN = {
  "bash": ["bash", "-euo", "pipefail", "-c"],
  "python": ["python3", "-c"],
}

_BLOCK = re.compile(
  r"^(<!-- test -->\n+)?```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
_COMMAND = re.compile(
  r"(?:python3? -m launch\.(\w+)|dcvideogen ((?:[a-z][\w-]* )+))([^\n|&;>]*)"
)


def blocks(text: str) -> list[tuple[bool, str, str]]:
  """(whether to run it, language, code) of each block."""
  return [(bool(m[1]), m[2], m[3]) for m in _BLOCK.finditer(text)]


def unknown(code: str, root: pathlib.Path = ROOT) -> list[str]:
  """Programs and flags in the code that do not exist."""
  found = []
  commands = _COMMAND.findall(code.replace("\\\n", " "))
  for script, words, arguments in commands:
    program = f"launch.{script}" if script else f"dcvideogen {words.strip()}"
    source = _source(script, words.split(), root)
    if not source:
      found.append(program)
      continue
    for flag in re.findall(r"--(\w+)", arguments):
      if not re.search(rf"(DEFINE_\w+|take|given)\(\s*\"{flag}\"", source):
        found.append(f"{program} --{flag}")
  return found


def _source(script: str, words: list[str], root: pathlib.Path) -> str:
  """The sources of a program and of what defines flags for several."""
  bodies = root / "dcvideogen_jax" / "programs"
  if script:
    paths = [*root.glob(f"launch/{script}.py")]
    paths += [p for p in bodies.glob(f"{script}*.py") if paths]
    paths += [p for p in [root / "benchmarks" / "main.py"] if paths]
    if script == "sample":
      paths += [bodies / "stream.py"]
  else:
    name = "_".join(words).replace("-", "_")
    paths = [*bodies.glob(f"{name}.py")]
  shared = ("common.py", "distributed.py", "sampling.py", "plan_flags.py")
  paths += [bodies / name for name in shared if paths]
  return "\n".join(path.read_text() for path in paths if path.exists())


BLOCKS = blocks(README.read_text()) if README.is_file() else []
TESTED = [(language, code) for run, language, code in BLOCKS if run]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  directory = tmp_path_factory.mktemp("readme") / "checkout"
  directory.mkdir()
  for path in ROOT.iterdir():
    if path.is_file():
      shutil.copy(path, directory)
    elif path.name in COPIED:
      ignored = shutil.ignore_patterns("__pycache__")
      shutil.copytree(path, directory / path.name, ignore=ignored)
  return directory


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  """An environment over this one, so that installing leaves this one alone."""
  directory = tmp_path_factory.mktemp("venv")
  subprocess.run([sys.executable, "-m", "venv", directory], check=True)
  (packages,) = directory.glob("lib/python*/site-packages")
  (packages / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return directory / "bin"


def test_some_commands_are_tested():
  assert any(language == "bash" for language, _ in TESTED)


@pytest.mark.parametrize(
  ("language", "code"), TESTED, ids=[code.split("\n")[0] for _, code in TESTED]
)
def test_command(checkout, programs, language, code):
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  environment["PATH"] = os.pathsep.join([str(programs), environment["PATH"]])
  finished = subprocess.run(
    [*RUN[language], code],
    cwd=checkout,
    env=environment,
    capture_output=True,
    text=True,
    timeout=LONGEST,
  )
  assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
  "code", [code for _, _, code in BLOCKS if _COMMAND.search(code)]
)
def test_programs_and_flags_exist(code):
  assert unknown(code) == []


def test_an_unknown_flag_is_found(tmp_path):
  (tmp_path / "launch").mkdir()
  (tmp_path / "launch" / "x.py").write_text(
    'flags.DEFINE_string(\n  "known", None, "")\nDEFINE_config_file("config")'
  )
  code = "python -m launch.x --known=1 \\\n  --config.a=2 --wrong && echo --no"
  assert unknown(code, tmp_path) == ["launch.x --wrong"]
  assert unknown("python -m launch.y", tmp_path) == ["launch.y"]
  assert unknown("dcvideogen plan xy --a") == ["dcvideogen plan xy"]
  assert unknown("dcvideogen sample --crf=1 --b") == ["dcvideogen sample --b"]


def test_blocks_are_found():
  text = (
    "a\n<!-- test -->\n```bash\nx\ny\n```\n```python\nz\n```\n```\nw\n```\n"
  )
  assert blocks(text) == [(True, "bash", "x\ny\n"), (False, "python", "z\n")]
