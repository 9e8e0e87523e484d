"""The command `dcvideogen` and how `launch/` chooses a program."""

import ast
import subprocess
import sys

import pytest

from dcvideogen_jax import convert
from dcvideogen_jax.models import dc_ae_v
from dcvideogen_jax.programs import cli, common
from dcvideogen_jax.tiny import download
from dcvideogen_jax.train import export
from tests.launch import launching


def run(monkeypatch, *arguments):
  """The exit code of `dcvideogen ARGUMENTS`."""
  monkeypatch.setattr(sys, "argv", ["dcvideogen", *arguments])
  with pytest.raises(SystemExit) as ended:
    cli.main()
  return ended.value.code


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_the_programs_are_listed(monkeypatch, capsys, arguments):
  assert run(monkeypatch, *arguments) == 0
  listed = capsys.readouterr().out
  assert [name for name in cli.PROGRAMS if f"  {name} " not in listed] == []
  assert max(map(len, listed.splitlines())) <= 80


@pytest.mark.parametrize(
  ("arguments", "line"),
  [
    (["smaple"], "there is no program 'smaple', did you mean sample?"),
    (["video"], "there is no program 'video': see dcvideogen --help"),
    (
      ["plan", "--target=h100"],
      "expected one of plan sample, plan train, plan decode, plan attention,"
      " found 'plan --target=h100'",
    ),
  ],
)
def test_a_name_that_is_none(monkeypatch, capsys, arguments, line):
  assert run(monkeypatch, *arguments) == 2
  assert capsys.readouterr().err == f"error: {line}\n"


def test_flags_follow_the_name(monkeypatch):
  started = []

  def start(name):
    started.append((name, sys.argv))
    sys.exit(0)

  monkeypatch.setattr(cli, "start", start)
  run(monkeypatch, "plan", "train", "--target=h100")
  run(monkeypatch, "sample", "plan")
  assert started == [
    ("plan train", ["dcvideogen plan train", "--target=h100"]),
    ("sample", ["dcvideogen sample", "plan"]),
  ]


def test_flags_that_chose_a_program(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["x", "--what=stream", "--at", "--whatever"])
  assert cli.given("what") == "stream"
  assert cli.take("at") == "" and cli.take("nothing") is None
  assert cli.take("what") == "stream"
  assert sys.argv == ["x", "--whatever"]
  monkeypatch.setattr(sys, "argv", ["x", "--what", "stream", "--at", "--b=1"])
  assert cli.take("at") == "" and cli.given("what") == "stream"
  assert cli.take("what") == "stream" and sys.argv == ["x", "--b=1"]


def test_help_shows_docstring_and_flags():
  finished = subprocess.run(
    [sys.executable, "-m", "launch.export", "--help"],
    cwd=launching.ROOT,
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0 and not finished.stderr
  assert "under the names of PyTorch" in finished.stdout
  assert "--workdir" in finished.stdout and "--compile_cache" in finished.stdout


def test_a_config_that_stands_apart_is_joined():
  given = ["--a=1", "--config", "tiny", "--config.steps=2", "--b"]
  joined = ["--a=1", "--config=tiny", "--config.steps=2", "--b"]
  assert common._joined(given) == joined


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    ([], ["--config=P.py:"]),
    (["--config.steps=2"], ["--config=P.py:", "--config.steps=2"]),
    (["--config=tiny,size=720p"], ["--config=P.py:tiny,size=720p"]),
    (["--config=a.b/c.py:d=1", "--x"], ["--config=a.b/c.py:d=1", "--x"]),
    (["-config=c.py"], ["-config=c.py"]),
    (["--configs=x"], ["--config=P.py:", "--configs=x"]),
  ],
)
def test_presets_are_found_by_name(given, expected):
  assert common._with_presets(given, "P.py") == expected


def listed(program, name):
  """A list in a program's source; importing it would define its flags."""
  path = launching.ROOT / "dcvideogen_jax" / "programs" / f"{program}.py"
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
      return ast.literal_eval(node.value)


def test_names_in_flags_are_those_of_the_library():
  layouts = {x for kind in convert.KINDS.values() for x in kind.layouts}
  assert listed("convert", "_KINDS") == sorted(convert.KINDS)
  assert listed("convert", "_LAYOUTS") == sorted(layouts)
  assert listed("plan_decode", "_MODELS") == [*dc_ae_v.VARIANTS]
  assert listed("prepare_clips", "_SPLITS") == [*download.SPLITS]
  assert listed("export", "_DTYPES") == [*export.DTYPES]
  assert listed("export", "_FORMATS") == [*export.FORMATS]
  kinds = {row.kind for row in export._ROWS.values()}
  written = {x for kind in kinds for x in convert.KINDS[kind].layouts}
  assert listed("export", "_LAYOUTS") == sorted(written)
