"""Compiled programs kept on disk, so that the next process need not trace.

jax's persistent cache saves XLA's work; an executable saves tracing and
lowering too. It is used for the same program only: the same name, shapes,
devices, versions, flags and sources of this package.

Safety. An executable is machine code inside a pickle, and reading a pickle runs
whatever it says. Files are therefore read only if they belong to the user of
the process and nobody else may write to them, which is how they are written:
never point this at a directory that came from somewhere else. A file begins
with the SHA-256 of the rest: machine code with a flipped bit would run.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import pickle
import platform
import stat
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import dcvideogen_jax
from dcvideogen_jax import errors, files

_DIGEST = hashlib.sha256().digest_size  # bytes


class Programs:
  """Compiles functions ahead of time, and keeps what it compiled.

  Attributes:
    loaded: how many programs came from the directory.
  """

  def __init__(self, directory: str | os.PathLike[str] | None = None):
    """Keeps programs in memory, and in `directory` if there is one.

    Of several processes none keeps its part of a program.
    """
    kept = directory is not None and jax.process_count() == 1
    self._directory = pathlib.Path(directory) if kept else None
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
    if self._directory is None:
      program = function.lower(*args).compile()
    else:
      path = self._directory / f"{key}.jaxexec"
      program = _load(path)
      self.loaded += program is not None
      if program is None:
        with _without_persistent_cache():
          program = function.lower(*args).compile()
        _save(path, program)
    self._programs[key] = program
    return program


def _key(name: str, args: Any) -> str:
  leaves, structure = jax.tree.flatten(args)
  text = repr(
    (
      name,
      [(x.shape, str(x.dtype), _placed(x)) for x in leaves],
      str(structure),
      jax.__version__,
      jaxlib.__version__,
      dcvideogen_jax.__version__,
      _sources(),
      _machine(),
      os.environ.get("XLA_FLAGS", ""),
      jax.config.jax_default_matmul_precision,
      jax.config.jax_enable_x64,
    )
  )
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def _placed(x: Any) -> tuple[str, list[int]] | None:
  """On which devices an argument lies, and how."""
  sharding = getattr(x, "sharding", None)
  if sharding is None:
    return None
  mesh = getattr(sharding, "mesh", None)
  if mesh is not None:
    devices = [d.id for d in mesh.devices.flat]
  else:
    devices = sorted(d.id for d in sharding.device_set)
  return str(sharding), devices


@functools.cache
def _sources() -> str:
  """A digest of this package's modules that programs are made of."""
  root = pathlib.Path(dcvideogen_jax.__file__).parent
  digest = hashlib.sha256((root / "sharding.py").read_bytes())
  for folder in ("models", "ops", "diffusion", "sample"):
    for path in sorted((root / folder).rglob("*.py")):
      digest.update(path.read_bytes())
  return digest.hexdigest()


@functools.cache
def _machine() -> tuple[Any, ...]:
  """What a program is compiled for.

  XLA uses every instruction of the processor that it runs on; the program would
  end the process on one that has fewer.
  """
  devices = [(d.platform, d.device_kind) for d in jax.devices()]
  client = jax.devices()[0].client
  processor = platform.machine()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = ("model name", "flags", "Features")
    processor += repr(sorted({n for n in lines if n.startswith(names)}))
  return devices, client.platform_version, processor


@contextlib.contextmanager
def _without_persistent_cache() -> Iterator[None]:
  """Compiles anew what jax has cached.

  An executable of the CPU that came out of a cache loses its functions when it
  is serialized again (jax 0.10 to 0.12), and then fails when it is run.
  """
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # It looks at the setting only once.
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def _load(path: pathlib.Path) -> Any | None:
  """The program in a file; None if there is none that can be run here."""
  try:
    if not _is_own(path):
      return None
    content = path.read_bytes()
    digest, data = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(data).digest() != digest:
      logging.warning("%s is damaged: the program is compiled again", path)
      return None
    ids, *program = pickle.loads(data)
    devices = {d.id: d for d in jax.devices()}
    return serialize_executable.deserialize_and_load(
      *program, execution_devices=[devices[i] for i in ids]
    )
  except Exception:  # Damaged in one of many ways: it is compiled again.
    return None


def _is_own(path: pathlib.Path) -> bool:
  """Whether only this user can have written a file."""
  about = path.stat()
  foreign = stat.S_IWGRP | stat.S_IWOTH
  return about.st_uid == os.getuid() and not about.st_mode & foreign


def _save(path: pathlib.Path, program: Any) -> None:
  """Writes a program, or nothing, which costs the next process some time."""
  try:
    ids = [d.id for d in program.runtime_executable().local_devices()]
    data = pickle.dumps((ids, *serialize_executable.serialize(program)))
  except (ValueError, TypeError, AttributeError, NotImplementedError):
    return  # Such as one that calls back into Python.
  except (pickle.PicklingError, jax.errors.JaxRuntimeError):
    return
  with contextlib.suppress(errors.UserError):
    files.make_directory(path.parent)
    with files.atomic(path, stat.S_IRUSR | stat.S_IWUSR) as temporary:
      temporary.write_bytes(hashlib.sha256(data).digest() + data)
