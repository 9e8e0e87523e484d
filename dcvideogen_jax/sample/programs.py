"""Compiled programs kept on disk, so that the next process need not trace.

jax's persistent cache saves XLA's work; an executable saves tracing and
lowering too. They are pickles, read only from the directory that this module
wrote, and only for the same versions, device and program.
"""

import hashlib
import os
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

import dcvideogen_jax
from dcvideogen_jax import errors, files


class Programs:
  """Compiles functions ahead of time, and keeps what it compiled.

  Attributes:
    loaded: how many programs came from the directory.
  """

  def __init__(self, directory: str | os.PathLike[str] | None = None):
    """Keeps programs in memory, and in `directory` if there is one."""
    self._directory = None if directory is None else pathlib.Path(directory)
    self._programs: dict[str, Any] = {}
    self.loaded = 0

  def get(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
    """The compiled `function` for arguments of these shapes.

    Args:
      name: says what the function does: functions of one name that get equal
        arguments must do the same.
      function: from `jax.jit`.
      *args: arrays, or shapes with shardings, in pytrees.
    """
    key = _key(name, args)
    if key in self._programs:
      return self._programs[key]
    path = self._directory and self._directory / f"{key}.jaxexec"
    program = path and _load(path)
    if program is None:
      program = function.lower(*args).compile()
      if path is not None:
        _save(path, program)
    else:
      self.loaded += 1
    self._programs[key] = program
    return program


def _key(name: str, args: Any) -> str:
  leaves, structure = jax.tree.flatten(args)
  described = [
    (x.shape, str(x.dtype), str(getattr(x, "sharding", None))) for x in leaves
  ]
  devices = [(d.platform, d.device_kind) for d in jax.devices()]
  text = repr(
    (
      name,
      described,
      str(structure),
      devices,
      jax.__version__,
      jaxlib.__version__,
      dcvideogen_jax.__version__,
      _sources(),
      os.environ.get("XLA_FLAGS", ""),
      jax.config.jax_default_matmul_precision,
    )
  )
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sources() -> str:
  """A digest of this package's modules that programs are made of."""
  root = pathlib.Path(dcvideogen_jax.__file__).parent
  digest = hashlib.sha256()
  for folder in ("models", "ops", "diffusion", "sample"):
    for path in sorted((root / folder).rglob("*.py")):
      digest.update(path.read_bytes())
  return digest.hexdigest()


def _load(path: pathlib.Path) -> Any | None:
  """The program in a file; None if there is none that this device can run."""
  if not path.is_file():
    return None
  try:
    return serialize_executable.deserialize_and_load(
      *pickle.loads(path.read_bytes())
    )
  except Exception:  # Damaged, or another driver's: it is compiled again.
    path.unlink(missing_ok=True)
    return None


def _save(path: pathlib.Path, program: Any) -> None:
  """Writes a program; a disk that is full costs the next process some time."""
  try:
    data = pickle.dumps(serialize_executable.serialize(program))
    files.make_directory(path.parent)
    with files.atomic(path) as temporary:
      temporary.write_bytes(data)
  except (errors.UserError, OSError, ValueError):
    path.unlink(missing_ok=True)
