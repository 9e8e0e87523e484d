"""Starts one program, which alone is imported."""

import importlib
import sys
import types

from dcvideogen_jax.programs import common


def start(name: str) -> None:
  """Runs a module of this package as if it had been started; never returns."""
  run(importlib.import_module(f"dcvideogen_jax.programs.{name}"))


def run(module: types.ModuleType) -> None:
  """Runs a module's `main`, with its docstring as the help."""
  sys.modules["__main__"].__doc__ = module.__doc__
  common.run(module.main, config=getattr(module, "DEFAULT_CONFIG", None))
