"""What every program shares: flags, one-sentence errors, a warm compiler.

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
import types
import warnings
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging

from dcvideogen_jax import errors, files

# Of --config where it describes a model.
CONFIG_HELP = (
  "Name of a released variant, a JSON file, or JSON text with the model's own"
  ' fields, such as {"latent_channels": 8, "widths": [...], "depths": [...]},'
  " or with those of another library's config.json."
  " Unset: as config.json beside the weights has it, or recognised from them."
)

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
  main: Callable[[Sequence[str]], None],
  presets: types.ModuleType | None = None,
) -> None:
  """Parses the flags, calls `main` and exits; never returns.

  An `errors.UserError` becomes one line on stderr and exit code 2, and so do
  memory that runs out and files that cannot be used. Any other exception is a
  bug of ours and keeps its traceback. jax has not to be imported before the
  flags are parsed, so that --help is there at once.

  Args:
    main: gets the arguments that are no flags.
    presets: a module with `get_config`; --config=NAME is its argument NAME, and
      without --config it has its default.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # jax would set 1.
  warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
  # An exception, so that temporary files are removed.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
  sys.argv[1:] = _joined(sys.argv[1:])
  if presets is not None:
    sys.argv[1:] = _with_presets(sys.argv[1:], presets.__file__)
  # --help shows the flags of the module that was started: all of ours are its.
  for module, found in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith(__package__):
      for flag in found:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(_one_sentence(main), flags_parser=_one_sentence(_parse))


def _joined(arguments: list[str]) -> list[str]:
  """--config TEXT as --config=TEXT, which is looked for before absl parses."""
  rest = iter(arguments)
  config = ("--config", "-config")
  return [f"{x}={next(rest, '')}" if x in config else x for x in rest]


def _with_presets(arguments: list[str], file: str) -> list[str]:
  """--config=NAME as --config=FILE:NAME; --config=FILE.py... stays."""
  config = re.compile(r"^--?config=(?![^:]*\.py(:|$))")
  if not any(re.match(r"--?config(=|$)", x) for x in arguments):
    arguments = ["--config=", *arguments]
  return [config.sub(f"--config={file}:", x) for x in arguments]


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
  import jax

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


def _start_jax() -> None:
  """Tells jax how much of a GPU to take and where to keep what it compiles."""
  # A wrong directory is told before the seconds that jax takes to import.
  cache = files.cache_directory() / "xla"
  if _COMPILE_CACHE.value is not None:
    cache = files.make_directory(_COMPILE_CACHE.value)

  import jax

  from dcvideogen_jax.plan import hardware

  # Of a GPU's memory; jax takes three quarters unless told.
  if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # Both are an error.
    os.environ.setdefault(
      "XLA_PYTHON_CLIENT_MEM_FRACTION", str(hardware.FRACTION)
    )
  if _COMPILE_CACHE.value or jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", os.fspath(cache))
  if not _COMPILE_CACHE.value:
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
    except (Exception, KeyboardInterrupt) as e:
      message, code = _told(e) or (f"{type(e).__name__}: {e}"[:300], _BUG)
      message = " ".join(message.split())
      if "jax" in sys.modules:  # Otherwise there are no other processes.
        from dcvideogen_jax import processes

        if code == _BUG and processes.joined():
          traceback.print_exception(e)
        processes.end(message, code)
      if code == _BUG:
        raise
      print(f"error: {message}", file=sys.stderr)
      sys.exit(code)

  return guarded


def _told(error: BaseException) -> tuple[str, int] | None:
  """A sentence and an exit code; None for a bug."""
  match error:
    case errors.UserError():
      return str(error), _BAD_INPUT
    case KeyboardInterrupt():
      return "interrupted", _INTERRUPTED
    case MemoryError():
      return f"the host is out of memory: {error}", _BAD_INPUT
    case OSError() if error.filename is not None:
      why = error.strerror or error
      return f"cannot use {error.filename}: {why}", _BAD_INPUT
    case OSError() if files.is_full(error):
      return f"the disk takes no more: {error.strerror or error}", _BAD_INPUT
    case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
      # Further lines list every allocation.
      first = str(error).splitlines()[0]
      return f"the device is out of memory: {first}", _BAD_INPUT
  return None  # Such as a connection that broke.


def _parse(argv: Sequence[str]) -> list[str]:
  """absl's parsing, with mistakes as `errors.UserError`.

  absl's own way ends with exit code 1, which a supervisor takes for a crash and
  starts again, and it parses twice, which ml_collections' flags do not survive.
  """
  for argument in argv:
    if file := re.match(r"--?config=([^:]+\.py)", argument):
      # Configs import each other from the folder above, as `configs.common`.
      sys.path.append(str(pathlib.Path(file[1]).resolve().parents[1]))
  try:
    rest = flags.FLAGS(list(argv))
    if "config" in flags.FLAGS:
      # ml_collections reports a missing file at the first use.
      hasattr(flags.FLAGS["config"].value, "lock")
  except SystemExit:  # After --help, as an error in absl's eyes.
    sys.exit(0)
  except flags.Error as e:
    # ml_collections puts a whole traceback into the message.
    trace = r"Error whilst parsing config file:.*\n[\w.]+: "
    raise errors.UserError(re.sub(trace, "", str(e), flags=re.S)) from e
  except OSError as e:
    raise errors.UserError(
      f"--config: cannot read the file: {str(e).splitlines()[-1].strip()};"
      " relative paths start at the working directory, and configs of trainings"
      " lie in configs/ of a checkout"
    ) from e
  except (AttributeError, LookupError, TypeError, ValueError) as e:
    frames = traceback.walk_tb(e.__traceback__)
    if not any("config_path" in f.f_code.co_filename for f, _ in frames):
      raise  # From inside the config file.
    # Some messages are the representation of another one.
    what = str(e.args[0] if e.args else e).replace("\\n", " ")
    what = re.sub(r"[\\\"']", "", what)
    raise errors.UserError(f"the config has no such key: {what}") from e
  if len(rest) > 1:
    raise errors.UserError(
      f"unexpected argument {rest[1]!r}: write options as --name=value"
    )
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = logging.WARNING
  _start_jax()
  return rest
