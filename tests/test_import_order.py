"""A folder imports only from the rows below it; flags and torch stay out."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "dcvideogen_jax"

# Row by first path component below the package; `launch` is above them all.
ROWS = {
  0: [
    "arrays",
    "errors",
    "documents",
    "files",
    "leftovers",
    "tree",
    "differences",
    "sharding",
    "checkpoint",
    "report",
    "memory",
    "levels",
    "digests",
    "flops",
    "clock",
    "packages",
    "processes",
    "provenance",
    "config_parts",
  ],
  1: ["ops", "tiny.synthetic"],
  2: ["tiny.world"],
  3: ["models", "diffusion", "data"],
  4: ["adapt", "convert", "eval", "latents"],
  5: ["eval.networks"],
  6: ["train", "sample"],
  7: ["plan", "precompute", "tiny"],
  8: ["app"],
  9: ["programs"],
  10: ["launch"],
}
# What programs import at the top: what needs no jax, so that --help is quick.
QUICK = ("absl", "ml_collections", "dcvideogen_jax", *sys.stdlib_module_names)
QUICK_OF_OURS = ("errors", "files", "programs", "presets")
ROW = {name: row for row, names in ROWS.items() for name in names}
MODULES = sorted((ROOT / PACKAGE).rglob("*.py")) + sorted(
  (ROOT / "launch").glob("*.py")
)


def _unit(path):
  """The name in ROWS that a file belongs to; None for the package itself."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  if parts[0] == "launch":
    return "launch"
  if parts[1:] == ("__init__",):
    return None
  module = ".".join(parts[1:3])
  return module if module in ROW else parts[1]


def _imports(nodes):
  """All dotted names imported by these AST nodes."""
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _violations(path, source):
  unit = _unit(path)
  relative = path.relative_to(ROOT).as_posix()
  if unit is not None and unit not in ROW:
    return [f"{relative} has no row"]
  tree = ast.parse(source)
  found = []
  for name in _imports(ast.walk(tree)):
    parts = name.split(".")
    if parts[0] == "absl" and "flags" in parts and unit != "programs":
      found.append(f"{relative} imports absl flags")
    if parts[0] in ("launch", "configs", "tests", "benchmarks") and (
      unit != "launch"
    ):
      found.append(f"{relative} imports {name}")
    if parts[0] != PACKAGE or len(parts) == 1 or unit is None:
      continue
    target = ".".join(parts[1:3])
    target = target if target in ROW else parts[1]
    if target not in ROW:
      if target == "__version__":
        continue
      found.append(f"{relative} imports {name}, which has no row")
    elif target != unit and ROW[target] >= ROW[unit] and ROW[unit] > 0:
      found.append(f"{relative} imports {name}, which is not below it")
    elif ROW[unit] == 0 and ROW[target] > 0:
      found.append(f"{relative} imports {name}, which is above it")
  for name in _imports(tree.body):
    if name.split(".")[0] in ("torch", "tensorflow"):
      found.append(f"{relative} imports {name} at the top")
    if unit == "programs" and not _is_quick(name):
      found.append(f"{relative} imports {name} at the top")
  return found


def _is_quick(name):
  first, *rest = name.split(".")
  ours = not rest or bool({*rest} & {*QUICK_OF_OURS})
  return first in QUICK and (first != PACKAGE or ours)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_module_imports_only_downwards(path):
  assert _violations(path, path.read_text()) == []


@pytest.mark.parametrize(
  ("file", "source"),
  [
    ("ops/x.py", "from dcvideogen_jax.models import dc_ae_v"),
    ("models/x.py", "from dcvideogen_jax.data import video"),
    ("tree.py", "from dcvideogen_jax.ops import conv3d"),
    ("models/x.py", "from absl import flags"),
    ("convert/x.py", "import torch"),
    ("nowhere/x.py", "import jax"),
    ("eval/x.py", "from launch import reconstruct"),
    ("programs/x.py", "import numpy"),
    ("programs/x.py", "from dcvideogen_jax.sample import loading"),
    ("eval/x.py", "from dcvideogen_jax.programs import reconstruct"),
  ],
)
def test_a_violation_is_found(file, source):
  assert _violations(ROOT / PACKAGE / file, source)


@pytest.mark.parity
def test_torch_and_tensorflow_are_not_imported():
  """Nor by the libraries that the package imports, where torch is there."""
  names = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in MODULES
    if path.parts[-2] not in ("launch", "programs")
  ]
  code = f"""
import importlib, importlib.util, sys
for name in {names}:
  importlib.import_module(name)
assert importlib.util.find_spec("torch")
print(sorted({{"torch", "tensorflow"}} & {{*sys.modules}}))
"""
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert run.stdout == "[]\n", run.stdout + run.stderr


def test_test_files_have_names_of_their_own():
  """Two of one name cannot be collected together."""
  names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
  assert sorted(names) == sorted(set(names))
