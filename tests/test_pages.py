"""README and docs/: their commands run, their links and flags exist.

A block is run if the line above it is `<!-- test -->`; the blocks of a page run
in order, in a copy of the checkout where the package is installed. The other
blocks have to name programs, flags, config fields and modules that exist.
"""

import ast
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))] if README.is_file() else []
COPIED = ("benchmarks", "configs", "dcvideogen_jax", "launch", "docs")
INSTALL = "python3 -m pip install --quiet -e ."
LONGEST = 600  # seconds
MOST_LINES = 200  # of the README
RUN = {
  "bash": ["bash", "-euo", "pipefail", "-c"],
  "python": ["python3", "-c"],
}
# Configs that together have every field that pages name as --config.FIELD.
CONFIGS = (
  "dcvideogen_jax.sample.presets:",
  "configs.adapt:tiny_t2v,phase=lora,causal=teacher",
  "configs.adapt:tiny_t2v,phase=embed",
  "configs.adapt:tiny_t2v,phase=few",
  "configs.tiny:autoencoder,phase=adversarial",
  "configs.tiny:autoencoder,phase=fast",
)

_BLOCK = re.compile(
  r"^(<!-- test -->\n+)?```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(
  r"(?:python3? -m launch\.(\w+)|dcvideogen ((?:[a-z][\w-]* )+))([^\n|&;>]*)"
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_FIELD = re.compile(r"--config\.([\w.]*\w)")


class Block(NamedTuple):
  """A block of code: whether it is run, its language and its text."""

  run: bool
  language: str
  code: str


def blocks(text: str) -> list[Block]:
  """The bash and Python blocks of a page."""
  return [Block(bool(m[1]), m[2], m[3]) for m in _BLOCK.finditer(text)]


def commands(code: str) -> Iterator[tuple[str, str, str]]:
  """Name under launch/, words after `dcvideogen`, arguments of each command.

  Variables that the block itself sets are replaced by their values.
  """
  code = code.replace("\\\n", " ")
  for name, value in re.findall(
    r"^(?:export )?(\w+)=(\"[^\"\n]*\"|\S+)$", code, re.MULTILINE
  ):
    value = value.strip('"')
    code = re.sub(rf"\${name}\b", lambda _, value=value: value, code)
  yield from _COMMAND.findall(code)


def unknown(code: str, root: pathlib.Path = ROOT) -> list[str]:
  """Programs and flags in the code that do not exist."""
  found = []
  for script, words, arguments in commands(code):
    program = f"launch.{script}" if script else f"dcvideogen {words.strip()}"
    source = _source(script, words.split(), root)
    if not source:
      found.append(program)
      continue
    for flag in re.findall(r"--(\w+)", arguments):
      if not re.search(rf"(DEFINE_\w+|take|given)\(\s*\"{flag}\"", source):
        found.append(f"{program} --{flag}")
  return found


def unknown_fields(code: str) -> list[str]:
  """Overrides, --config.FIELD, that the config of their command lacks."""
  found = []
  for script, words, arguments in commands(code):
    fields = _FIELD.findall(arguments)
    named = re.search(r"--config=(\S+)", arguments)
    name = named[1] if named else ""
    if not fields or "$" in name:
      continue
    file, colon, argument = name.partition(":")
    if not file.endswith(".py"):
      file, argument = "dcvideogen_jax/sample/presets.py", name
    module = file.removesuffix(".py").replace("/", ".")
    config = importlib.import_module(module).get_config(argument)
    program = script or words.strip()
    found += [f"{program} {x}" for x in fields if not _has(config, x)]
  return found


def unknown_imports(code: str, root: pathlib.Path = ROOT) -> list[str]:
  """Modules and names that Python code imports from the package in vain."""
  found = []
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("dcvideo"):
      package = root / node.module.replace(".", "/")
      init = package / "__init__.py"
      text = init.read_text() if init.is_file() else ""
      found += [
        f"{node.module}.{x.name}"
        for x in node.names
        if not (package / f"{x.name}.py").is_file()
        and not (package / x.name).is_dir()
        and not re.search(rf"\bas {x.name}\b", text)
      ]
  return found


def broken_links(page: pathlib.Path, docs: pathlib.Path = DOCS) -> list[str]:
  """Relative links of a page, images too, whose file or heading is missing.

  A page under docs/ may only link to files under docs/, which is the site.
  """
  text = re.sub(r"`[^`\n]*`", "", _FENCED.sub("", page.read_text()))
  found = []
  for link in _LINK.findall(text):
    if re.match(r"\w+:", link):
      continue
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page.resolve()
    outside = docs in page.parents and docs not in target.parents
    if outside or not target.is_file() or not _has_heading(target, anchor):
      found.append(link)
  return found


def _has_heading(page: pathlib.Path, anchor: str) -> bool:
  """Whether a heading has this anchor, on GitHub and on the site alike."""
  if not anchor:
    return True
  text = _FENCED.sub("", page.read_text())
  for heading in _HEADING.findall(text):
    words = re.sub(r"[^\w\s-]", "", heading.lower())
    on_github = words.replace(" ", "-")
    on_the_site = re.sub(r"[-\s]+", "-", words.strip())
    if on_github == on_the_site == anchor:
      return True
  return False


def _has(config, field: str) -> bool:
  """Whether a config has a field, whose name may have dots."""
  for name in field.split("."):
    if not hasattr(config, "keys") or name not in config:
      return False
    config = config[name]
  return True


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
  paths = [path for path in paths if path.exists()]
  for path in paths:  # Grows by the modules of flags that a program imports.
    for names in re.findall(
      r"from dcvideogen_jax\.programs import (\([^)]*\)|[\w, ]+)",
      path.read_text(),
    ):
      found = (bodies / f"{name}.py" for name in re.findall(r"\w+", names))
      paths += [x for x in found if x.exists() and x not in paths]
  return "\n".join(path.read_text() for path in paths)


def _name(page: pathlib.Path) -> str:
  return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  directory = tmp_path_factory.mktemp("pages") / "checkout"
  directory.mkdir()
  for path in ROOT.iterdir():
    if path.is_file():
      shutil.copy(path, directory)
    elif path.name in COPIED:
      ignored = shutil.ignore_patterns("__pycache__")
      shutil.copytree(path, directory / path.name, ignore=ignored)
  return directory


@pytest.fixture(scope="module")
def run(checkout, tmp_path_factory):
  """Runs code in an environment over this one, which is left as it is."""
  directory = tmp_path_factory.mktemp("venv")
  subprocess.run([sys.executable, "-m", "venv", directory], check=True)
  (packages,) = directory.glob("lib/python*/site-packages")
  (packages / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  path = os.pathsep.join([str(directory / "bin"), environment["PATH"]])
  environment["PATH"] = path

  def run(language, code):
    finished = subprocess.run(
      [*RUN[language], code],
      cwd=checkout,
      env=environment,
      capture_output=True,
      text=True,
      timeout=LONGEST,
    )
    told = finished.stdout + finished.stderr
    assert finished.returncode == 0, f"{code}\n{told}"

  run("bash", INSTALL)
  return run


TESTED = {
  _name(page): [block for block in blocks(page.read_text()) if block.run]
  for page in PAGES
}


def test_some_blocks_are_tested():
  assert INSTALL in "".join(block.code for block in TESTED["README.md"])
  languages = {block.language for found in TESTED.values() for block in found}
  assert languages == {*RUN}


@pytest.mark.parametrize("page", [name for name in TESTED if TESTED[name]])
def test_blocks_run(run, page):
  for block in TESTED[page]:
    if block.code.strip() != INSTALL:
      run(block.language, block.code)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_name_what_exists(page):
  found = []
  for block in blocks(page.read_text()):
    if block.language == "python":
      found += unknown_imports(block.code)
    else:
      found += unknown(block.code) + unknown_fields(block.code)
  assert found == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
  assert broken_links(page) == []


def test_fields_in_the_text_exist():
  configs = []
  for name in CONFIGS:
    module, _, argument = name.partition(":")
    configs.append(importlib.import_module(module).get_config(argument))
  missing = {
    f"{_name(page)}: {field}"
    for page in PAGES
    for field in _FIELD.findall(page.read_text())
    if not field.isupper() and not any(_has(c, field) for c in configs)
  }
  assert not missing


def test_the_reference_names_modules_that_exist():
  named = [
    name
    for page in PAGES
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
  ]
  assert named
  missing = [n for n in named if not (ROOT / n.replace(".", "/")).is_dir()]
  missing = [
    n for n in missing if not (ROOT / f"{n.replace('.', '/')}.py").is_file()
  ]
  assert missing == []


def test_the_readme_is_short():
  assert len(README.read_text().splitlines()) <= MOST_LINES


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
  variable = 'FLAGS="--known=1 --odd=2"\npython -m launch.x $FLAGS'
  assert unknown(variable, tmp_path) == ["launch.x --odd"]


def test_an_unknown_field_is_found():
  code = "dcvideogen sample --config={} --config.steps=1 --config.mesh.odd=2"
  assert unknown_fields(code.format("tiny")) == ["sample mesh.odd"]
  file = "configs/tiny.py:autoencoder"
  assert unknown_fields(code.format(file)) == ["sample mesh.odd"]


def test_an_unknown_import_is_found():
  code = "from dcvideogen_jax.models import bands, odd\nimport numpy\n"
  assert unknown_imports(code) == ["dcvideogen_jax.models.odd"]
  code = "from dcvideogen_jax.convert import load, odd"
  assert unknown_imports(code) == ["dcvideogen_jax.convert.odd"]


def test_a_broken_link_is_found(tmp_path):
  docs = tmp_path / "docs"
  docs.mkdir()
  (tmp_path / "outside.md").write_text("# Outside\n")
  text = "# One two\n```\n# no heading\n```\n## Three ...\n"
  (docs / "a.md").write_text(text)
  (docs / "b.md").write_text(
    "[1](a.md) [2](a.md#one-two) [3](a.md#no-heading) [4](a.md#three)\n"
    "[5](#odd) [6](../outside.md) [7](https://x.y) `[8](no.md)`\n"
    "![over two\nlines](no.png)\n"
  )
  assert broken_links(docs / "b.md", docs) == [
    "a.md#no-heading",
    "a.md#three",
    "#odd",
    "../outside.md",
    "no.png",
  ]


def test_blocks_are_found():
  text = (
    "a\n<!-- test -->\n```bash\nx\ny\n```\n```python\nz\n```\n```\nw\n```\n"
  )
  assert blocks(text) == [(True, "bash", "x\ny\n"), (False, "python", "z\n")]
