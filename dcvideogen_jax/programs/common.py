"""Startup code shared by all programs: flags, errors, the compilation cache.

Exit codes: 0 for success, 1 for a bug, 2 for bad input, which includes wrong
flags, 130 for an interrupt (Ctrl-C), 141 for output that nothing reads any more
(`| head`) and 143 for SIGTERM.
"""

import contextlib
import functools
import os
import pathlib
import re
import signal
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

from absl import app, flags, logging

from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import pipes

# Help of the flag --config in programs where it describes a model.
CONFIG_HELP = (
  "Name of a released variant, a JSON file, or JSON text with the model's own"
  ' fields, such as {"latent_channels": 8, "widths": [...], "depths": [...]},'
  " or with those of another library's config.json."
  " Unset: read from the config.json beside the weights, or recognised from the"
  " weights."
)

DECODER_HELP = (
  "Decoder of DC-AE-V: fast, the smaller one in the folder MODEL_fast beside"
  " the weights MODEL, or the path of one. Unset: the model's own."
)

_COMPILE_CACHE = flags.DEFINE_string(
  "compile_cache",
  None,
  "Directory for compiled XLA programs, which later runs load instead of"
  " compiling again. Several machines can share one; gs://bucket/directory"
  " works too. Unset: xla/ in the user's cache directory of dcvideogen_jax,"
  " unless jax has a compilation cache configured.",
)

_BUG = 1
_BAD_INPUT = 2
_INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def run(
  main: Callable[[Sequence[str]], None],
  presets: types.ModuleType | None = None,
) -> None:
  """Parses the flags, calls `main` and exits; never returns.

  An `errors.UserError`, exhausted memory and a file that cannot be used become
  one line on stderr and exit code 2. Any other exception is a bug of this
  library and keeps its traceback. jax is imported only after the flags are
  parsed, so that --help answers at once.

  Args:
    main: is called with the program's name and the arguments that are not
      flags.
    presets: a module with `get_config`. --config=NAME then means
      `get_config(NAME)`, and without --config its default config is used.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # jax would set 1.
  warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
  signal.signal(signal.SIGTERM, terminate)
  sys.argv[1:] = _joined(sys.argv[1:])
  if presets is not None:
    sys.argv[1:] = _with_presets(sys.argv[1:], presets.__file__)
  # --help lists the key flags of the started module, so every flag of this
  # package is registered as one of them.
  for module, found in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith(__package__):
      for flag in found:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  with pipes.quiet():
    app.run(_one_sentence(main), flags_parser=_one_sentence(_parse))


_DROPS_EXCEPTIONS = ("__del__", "_xla_gc_callback")


def terminate(number: int, frame: types.FrameType | None) -> None:
  """Ends the program on SIGTERM by SystemExit, so that temporary files go.

  Python drops an exception that leaves a finaliser, such as that of a progress
  bar, or a callback of the garbage collector, such as jax's. If one is running,
  the signal is sent again a moment later.

  Args:
    number: of the signal.
    frame: what was running.
  """
  while frame is not None:
    if frame.f_code.co_name in _DROPS_EXCEPTIONS:
      again = threading.Timer(0.05, os.kill, (os.getpid(), number))
      again.daemon = True
      again.start()
      return
    frame = frame.f_back
  sys.exit(TERMINATED)


def refuse_flags(names: Iterable[str], why: str) -> None:
  """Refuses flags that are on the command line but would have no effect.

  Args:
    names: of the flags.
    why: the end of the error sentence, such as "goes with --videos only".

  Raises:
    errors.UserError: for the first of these flags that was given.
  """
  for name in names:
    if flags.FLAGS[name].present:
      raise errors.UserError(f"--{name} {why}")


def _joined(arguments: list[str]) -> list[str]:
  """Rewrites `--config TEXT` as `--config=TEXT`, as `_with_presets` needs."""
  rest = iter(arguments)
  config = ("--config", "-config")
  return [f"{x}={next(rest, '')}" if x in config else x for x in rest]


def _with_presets(arguments: list[str], file: str) -> list[str]:
  """Rewrites --config=NAME as --config=FILE:NAME, but keeps --config=X.py...

  Without any --config, `--config=FILE:` is added.
  """
  config = re.compile(r"^--?config=(?![^:]*\.py(:|$))")
  if not any(re.match(r"--?config(=|$)", x) for x in arguments):
    arguments = ["--config=", *arguments]
  return [config.sub(f"--config={file}:", x) for x in arguments]


@contextlib.contextmanager
def output_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Makes a directory; after a failure, removes the new ones that are empty.

  When several processes have joined, only process 0 gets this directory. The
  others get a temporary one, so that all processes run the same code.

  Raises:
    errors.UserError: if the directory cannot be made, or its path is remote.
  """
  if files.is_remote(path):
    raise errors.UserError(
      f"expected an output directory of this machine, found {path}"
    )
  import jax

  # `process_index` starts jax's backends, which not every program needs, so
  # `is_initialized` is asked first.
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
  """Sets jax's share of GPU memory and its directory of compiled programs."""
  # Importing jax takes seconds, so a wrong directory is reported before.
  cache = files.cache_directory() / "xla"
  if _COMPILE_CACHE.value is not None:
    cache = files.make_directory(_COMPILE_CACHE.value)

  import jax

  from dcvideogen_jax.plan import hardware

  # The share of GPU memory; jax's default is three quarters. jax refuses to
  # start with both variables set.
  if "XLA_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault(
      "XLA_PYTHON_CLIENT_MEM_FRACTION", str(hardware.FRACTION)
    )
  if _COMPILE_CACHE.value or jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", os.fspath(cache))
  if not _COMPILE_CACHE.value:
    # Small programs are cached too: together they take a second to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  # A cache that cannot be read or written only costs time.
  warnings.filterwarnings("ignore", "Error (read|writ)ing persistent compil")


def _one_sentence(function):
  """Wraps `function`: errors that a user can mend are printed in one line."""

  @functools.wraps(function)
  def guarded(argv):
    try:
      return function(argv)
    except (Exception, KeyboardInterrupt) as e:
      message, code = _told(e) or (f"{type(e).__name__}: {e}"[:300], _BUG)
      message = " ".join(message.split())
      if "jax" in sys.modules:  # Without jax, no other process has joined.
        from dcvideogen_jax import processes

        if code == _BUG and processes.joined():
          traceback.print_exception(e)
        processes.end(message, code)
      if code == _BUG:
        raise
      if code != pipes.CODE:
        print(f"error: {message}", file=sys.stderr)
      sys.exit(code)

  return guarded


def _told(error: BaseException) -> tuple[str, int] | None:
  """Returns a sentence and an exit code for an error; None for a bug."""
  match error:
    case errors.UserError():
      return str(error), _BAD_INPUT
    case KeyboardInterrupt():
      return "interrupted", _INTERRUPTED
    case BrokenPipeError() if pipes.is_broken():
      return "nothing reads the output any more", pipes.CODE
    case MemoryError():
      return f"the host is out of memory: {error}", _BAD_INPUT
    case OSError() if error.filename is not None:
      why = error.strerror or error
      return f"cannot use {error.filename}: {why}", _BAD_INPUT
    case OSError() if files.is_full(error):
      return f"the disk takes no more: {error.strerror or error}", _BAD_INPUT
    case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
      # The further lines list every allocation.
      first = str(error).splitlines()[0]
      return f"the device is out of memory: {first}", _BAD_INPUT
  return None  # For example an OSError of a broken connection.


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses flags with absl, and raises mistakes as `errors.UserError`.

  absl's own parser exits with code 1 on a mistake, which a supervisor takes for
  a crash and restarts. It also parses twice, which breaks ml_collections'
  flags.
  """
  for argument in argv:
    if file := re.match(r"--?config=([^:]+\.py)", argument):
      # Configs import each other as `configs.common`, from the folder above.
      sys.path.append(str(pathlib.Path(file[1]).resolve().parents[1]))
  try:
    rest = flags.FLAGS(list(argv))
    if "config" in flags.FLAGS:
      # ml_collections reports a missing config file only when the value is
      # used first.
      hasattr(flags.FLAGS["config"].value, "lock")
  except SystemExit:  # absl exits with an error code after --help.
    sys.exit(0)
  except flags.Error as e:
    # ml_collections puts a whole traceback into its message.
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
      raise  # The error was raised by the config file itself.
    # Some messages are the `repr` of another message.
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
