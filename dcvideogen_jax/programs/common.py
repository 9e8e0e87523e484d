"""What every program shares: flags, one-sentence errors, a warm compiler.

A program is flags and a `main(argv)`, and ends with

  if __name__ == "__main__":
    _program.run(main)

Exit codes: 0 done, 1 a bug, 2 bad input, wrong flags among it, 130 interrupted,
143 terminated.
"""

import contextlib
import functools
import os
import pathlib
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from dcvideogen_jax import errors, files, processes
from dcvideogen_jax.plan import hardware

_COMPILE_CACHE = flags.DEFINE_string(
  "compile_cache",
  None,
  "Keeps compiled programs in a directory, or gs://bucket/directory, which"
  " machines can share. Unset: in the user's cache directory.",
)

_BUG = 1
_BAD_INPUT = 2
_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM


def run(
  main: Callable[[Sequence[str]], None], config: str | None = None
) -> None:
  """Parses the flags, calls `main` and exits; never returns.

  An `errors.UserError` becomes one line on stderr and exit code 2, and so do
  memory that runs out and files that cannot be used. Any other exception is a
  bug of ours and keeps its traceback.

  Args:
    main: gets the arguments that are no flags.
    config: stands for --config where it is not given. As the flag's default it
      would be read, and complained about, before this function is called.
  """
  # jax has set "1" by now; it is read at XLA's first log line, later.
  if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
  warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
  # An exception, so that temporary files are removed.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
  # Of a GPU's memory; jax takes three quarters unless told.
  if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # Both are an error.
    os.environ.setdefault(
      "XLA_PYTHON_CLIENT_MEM_FRACTION", str(hardware.FRACTION)
    )
  given = any(re.match(r"--?config(=|$)", arg) for arg in sys.argv)
  if config is not None and not given:
    sys.argv.insert(1, f"--config={config}")
  app.run(_one_sentence(main), flags_parser=_one_sentence(_parse))


@contextlib.contextmanager
def output_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Makes a directory; after a failure, empty ones that were made go again.

  Several processes each get one, so that all do the same, but what is written
  stays in that of process 0 only.

  Raises:
    errors.UserError: if it cannot be made, or is not on this machine.
  """
  if files.is_remote(path):
    raise errors.UserError(
      f"expected an output directory of this machine, found {path}"
    )
  # Asking jax for its devices would start it, which not all programs do.
  if jax.distributed.is_initialized() and jax.process_index() > 0:
    with tempfile.TemporaryDirectory() as scratch:
      yield pathlib.Path(scratch)
    return
  directory = pathlib.Path(path)
  made = [p for p in (directory, *directory.parents) if not p.exists()]
  try:
    files.make_directory(directory)
    yield directory
  except BaseException:
    with contextlib.suppress(OSError):
      for empty in made:
        empty.rmdir()
    raise


def _keep_compiled_programs() -> None:
  """Turns the persistent compilation cache on; the flag goes first."""
  if _COMPILE_CACHE.value is not None:
    cache = os.fspath(files.make_directory(_COMPILE_CACHE.value))
    jax.config.update("jax_compilation_cache_dir", cache)
  elif jax.config.jax_compilation_cache_dir is None:
    cache = os.fspath(files.cache_directory() / "xla")
    jax.config.update("jax_compilation_cache_dir", cache)
    # Small programs too: all of them together take a second to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  # A cache that cannot be written costs time, nothing else.
  warnings.filterwarnings("ignore", "Error (read|writ)ing persistent compil")


def _one_sentence(function):
  """`function`, with what the user can mend told in one line."""

  @functools.wraps(function)
  def guarded(argv):
    try:
      return function(argv)
    except errors.UserError as e:
      _stop(str(e), _BAD_INPUT)
    except KeyboardInterrupt:
      _stop("interrupted", _INTERRUPTED)
    except MemoryError as e:
      _stop(f"the host is out of memory: {e}", _BAD_INPUT)
    except OSError as e:
      if e.filename is not None:
        _stop(f"cannot use {e.filename}: {e.strerror or e}", _BAD_INPUT)
      if not files.is_full(e):  # Such as a connection that broke.
        _bug(e)
        raise
      _stop(f"the disk takes no more: {e.strerror or e}", _BAD_INPUT)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        _bug(e)
        raise
      # Further lines list every allocation.
      first = str(e).splitlines()[0]
      _stop(f"the device is out of memory: {first}", _BAD_INPUT)
    except Exception as e:
      _bug(e)
      raise

  return guarded


def _bug(error: Exception) -> None:
  """Ends the other processes, if there are any, and this one with them."""
  if jax.distributed.is_initialized():
    traceback.print_exception(error)
    message = f"{type(error).__name__}: {error}"
    processes.end(" ".join(message.split())[:300], _BUG)


def _stop(message: str, code: int) -> None:
  message = " ".join(message.split())
  processes.end(message, code)
  print(f"error: {message}", file=sys.stderr)
  sys.exit(code)


def _parse(argv: Sequence[str]) -> list[str]:
  """absl's parsing, with the mistakes of users told in the project's way.

  absl's own way ends with exit code 1, which a supervisor takes for a crash and
  starts again, and it parses twice, which ml_collections' flags do not survive.
  """
  try:
    rest = flags.FLAGS(list(argv))
  except flags.Error as e:
    if "Error whilst parsing config file" not in str(e):
      raise errors.UserError(str(e)) from e
    # ml_collections puts a whole traceback into the message.
    reason = str(e).strip().splitlines()[-1].partition(": ")[2]
    raise errors.UserError(f"--config: {reason}") from e
  except OSError as e:  # An override of a config whose file is not there.
    reason = str(e).splitlines()[-1].strip()
    raise errors.UserError(f"--config: cannot read the file: {reason}") from e
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
    if not _is_about_an_override(e):
      raise
    raise errors.UserError(
      "the config has no such key: " + _blame(str(e), argv)
    ) from e
  for name in flags.FLAGS:
    if flags.FLAGS[name].value is not None:
      _require_config_file(flags.FLAGS[name])
  if len(rest) > 1:
    raise errors.UserError(
      f"unexpected argument {rest[1]!r}: write options as --name=value"
    )
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = logging.WARNING
  _keep_compiled_programs()
  return rest


def _is_about_an_override(error: BaseException) -> bool:
  """Whether ml_collections failed to resolve `--config.a.b`.

  An error inside the config file itself does not pass through this module.
  """
  frames = traceback.walk_tb(error.__traceback__)
  modules = {frame.f_globals.get("__name__") for frame, _ in frames}
  return "ml_collections.config_flags.config_path" in modules


def _blame(message: str, argv: Sequence[str]) -> str:
  """The `--config.a.b` that share a word with the message, else all."""
  overrides = [arg.split("=")[0] for arg in argv if re.match(r"--?\w+\.", arg)]
  words = set(re.findall(r"\w+", message))
  named = [o for o in overrides if words & set(re.findall(r"\w+", o)[1:])]
  hint = re.search("Did you mean.*", message)
  return ", ".join(named or overrides) + (f" ({hint[0]})" if hint else "")


def _require_config_file(flag: flags.Flag) -> None:
  """Reports a missing config file now; ml_collections waits for first use."""
  with contextlib.suppress(TypeError):  # Not the flag of a config.
    filename = config_flags.get_config_filename(flag)
    try:
      hasattr(flag.value, "lock")
    except OSError as e:
      raise errors.UserError(
        f"--{flag.name}: cannot read the config file {filename!r};"
        " relative paths start at the working directory"
      ) from e
