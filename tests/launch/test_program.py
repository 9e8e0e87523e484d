"""What all programs share: exit codes, one sentence, configs, the cache."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dcvideogen_jax.programs import common
from tests.launch import launching

PROGRAM = """
  import sys

  import jax
  from absl import flags, logging
  from ml_collections import config_flags

  from dcvideogen_jax import errors
  from dcvideogen_jax.programs import common

  _CONFIG = config_flags.DEFINE_config_file("config")
  _DO = flags.DEFINE_string("do", "", "What happens.")


  def main(argv):
    match _DO.value:
      case "user_error":
        raise errors.UserError("a\\nb  is wrong")
      case "bug":
        raise ValueError("a bug")
      case "interrupt":
        raise KeyboardInterrupt
      case "host_memory":
        raise MemoryError("Unable to allocate 9 TiB")
      case "device_memory":
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9T\\nlong list")
      case "device_bug":
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")
      case "file":
        open("nowhere/at_all")
      case "full":
        raise OSError(28, "No space left on device")
      case "connection":
        raise ConnectionResetError(104, "Connection reset by peer")
      case "logs":
        logging.info("quiet")
        logging.warning("loud")
      case "directory":
        with common.output_directory("a/b/c") as directory:
          assert directory.is_dir()
          raise errors.UserError("stop")
      case "remote":
        with common.output_directory("gs://bucket/x"):
          pass
      case "prints":
        for line in range(10_000):
          print("a table's line", flush=True)
      case "wait":
        with common.output_directory("a") as directory:
          print("ready", flush=True)
          input()
    print(_CONFIG.value and _CONFIG.value.to_json())
    print(jax.config.jax_compilation_cache_dir)


  if __name__ == "__main__":
    common.run(main)
"""

CONFIG = """
  import ml_collections


  def get_config(arg="small"):
    if arg == "broken":
      return {}["missing"]
    if arg != "small":
      raise ValueError(f"unknown variant {arg!r}: expected small")
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict({"width": 8})
    config.rate = 0.1
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  directory = tmp_path_factory.mktemp("place")
  (directory / "prog.py").write_text(textwrap.dedent(PROGRAM))
  (directory / "conf.py").write_text(textwrap.dedent(CONFIG))
  return directory


def start(
  place,
  *flags,
  arguments=("prog.py",),
  stdout=subprocess.PIPE,
  **environment,
):
  return subprocess.Popen(
    [sys.executable, *arguments, *flags],
    cwd=place,
    env={
      "PYTHONPATH": str(launching.ROOT),
      "HOME": str(place),
      "JAX_PLATFORMS": "cpu",
      **environment,
    },
    stdin=subprocess.PIPE,
    stdout=stdout,
    stderr=subprocess.PIPE,
    text=True,
    # A shell's background jobs ignore it, and so would this one.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )


def run(place, *flags, **environment):
  process = start(place, *flags, **environment)
  stdout, stderr = process.communicate()
  return launching.Finished(process.returncode, stdout, stderr)


@pytest.mark.parametrize(
  ("flags", "code", "line"),
  [
    (["--do=user_error"], 2, "error: a b is wrong"),
    (["--do=interrupt"], 130, "error: interrupted"),
    (
      ["--do=host_memory"],
      2,
      "error: the host is out of memory: Unable to allocate 9 TiB",
    ),
    (
      ["--do=device_memory"],
      2,
      "error: the device is out of memory: RESOURCE_EXHAUSTED: 9T",
    ),
    (["--do=directory"], 2, "error: stop"),
    (
      ["--do=remote"],
      2,
      "error: expected an output directory of this machine, found"
      " gs://bucket/x",
    ),
    (
      ["--compile_cache=prog.py/x"],
      2,
      "error: cannot create the output directory prog.py/x: Not a directory",
    ),
    (
      ["--compile_cache=s3://bucket/x"],
      2,
      "error: expected a path of this machine or one that begins with gs://,"
      " found s3://bucket/x",
    ),
    (
      ["stray"],
      2,
      "error: unexpected argument 'stray': write options as --name=value",
    ),
    (
      ["--do=file"],
      2,
      "error: cannot use nowhere/at_all: No such file or directory",
    ),
    (
      ["--do=full"],
      2,
      "error: the disk takes no more: No space left on device",
    ),
    (
      ["--config=conf.py", "--config.model.depth=3", "--config.rate=1"],
      2,
      "error: the config has no such key: depth",
    ),
    (
      ["--config=conf.py", "--config.rate.x=3"],
      2,
      "error: the config has no such key: Attribute <class float>.x does not"
      " exist and the type does not support indexing. Attempting to lookup:"
      " rate.x",
    ),
    (
      ["--config=conf.py:huge"],
      2,
      "error: flag --config=conf.py:huge: unknown variant 'huge': expected"
      " small",
    ),
    (
      ["--config=nowhere.py"],
      2,
      "error: --config: cannot read the file: [Errno 2] No such file or"
      " directory: 'nowhere.py'; relative paths start at the working directory,"
      " and configs of trainings lie in configs/ of a checkout",
    ),
  ],
)
def test_one_sentence(place, flags, code, line):
  finished = run(place, *flags)
  assert finished.stderr.splitlines() == [line]
  assert finished.code == code
  assert not (place / "a").exists()


@pytest.mark.parametrize(
  ("flags", "last"),
  [
    (["--do=bug"], "ValueError: a bug"),
    (["--do=device_bug"], "INTERNAL: broken"),
    (["--do=connection"], "Connection reset by peer"),
    (["--config=conf.py:broken"], "KeyError: 'missing'"),
  ],
)
def test_a_bug_keeps_its_traceback(place, flags, last):
  finished = run(place, *flags)
  assert finished.code == 1
  assert "Traceback" in finished.stderr
  assert finished.stderr.rstrip().endswith(last)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--unknown=1"], "Unknown command line flag 'unknown'"),
    (["--config.rate=1"], "Unknown command line flag 'config.rate'"),
    (["--config=conf.py", "--config.rate=fast"], "--config.rate=fast: "),
    (["--config=conf.py", "--config.model.width=8.5"], "width=8.5: "),
    (["--compile_cache"], "Missing value for flag --compile_cache"),
  ],
)
def test_wrong_flags_are_bad_input(place, flags, message):
  finished = run(place, *flags)
  assert finished.code == 2
  assert finished.stderr.startswith("error: ")
  assert message in finished.stderr
  assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "arguments",
  [
    ["prog.py", "--do=prints"],
    ["prog.py", "--help"],
    ["-c", "from dcvideogen_jax.programs import cli; cli.main()"],
  ],
)
def test_output_that_nothing_reads_ends_a_program_quietly(place, arguments):
  reader, writer = os.pipe()
  os.close(reader)
  process = start(place, arguments=arguments, stdout=writer)
  os.close(writer)
  assert process.communicate()[1] == ""
  assert process.returncode == 128 + signal.SIGPIPE


def test_config_and_logging(place):
  finished = run(place, "--config=conf.py", "--config.rate=0.5", "--do=logs")
  assert finished.code == 0
  assert '{"model": {"width": 8}, "rate": 0.5}' in finished.stdout
  assert "loud" in finished.stderr and "quiet" not in finished.stderr


def test_configs_import_each_other(place):
  folder = place / "checkout" / "sets"
  folder.mkdir(parents=True)
  (folder / "a.py").write_text("from sets.b import get_config")
  (folder / "b.py").write_text(textwrap.dedent(CONFIG))
  assert '"rate": 0.1' in run(place, "--config=checkout/sets/a.py").stdout


def test_compiled_programs_are_kept(place):
  home = str(place / ".cache" / "dcvideogen_jax" / "xla")
  assert home in run(place).stdout
  assert "/x/dcvideogen_jax/xla" in run(place, XDG_CACHE_HOME="/x").stdout
  told = {"JAX_COMPILATION_CACHE_DIR": "/y"}
  assert "/y\n" in run(place, **told).stdout
  assert "z/xla\n" in run(place, "--compile_cache=z/xla", **told).stdout
  assert (place / "z" / "xla").is_dir()
  assert "/w/xla\n" in run(place, DCVIDEOGEN_CACHE="/w").stdout


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signals_clean_up(place, number, code):
  process = start(place, "--do=wait")
  assert process.stdout.readline() == "ready\n"
  process.send_signal(number)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == code
  assert "Traceback" not in stderr
  assert not pathlib.Path(place, "a").exists()


class Ended:
  """Receives SIGTERM while it is finalised, where Python drops exceptions."""

  def __del__(self):
    os.kill(os.getpid(), signal.SIGTERM)


def _collected():
  """Collects garbage; a callback with the name of jax's receives SIGTERM."""

  def _xla_gc_callback(*_):
    gc.callbacks.remove(_xla_gc_callback)
    os.kill(os.getpid(), signal.SIGTERM)

  gc.callbacks.append(_xla_gc_callback)
  gc.collect()


@pytest.mark.parametrize("receive", [Ended, _collected])
def test_sigterm_during_a_finaliser_is_not_lost(receive):
  before = signal.signal(signal.SIGTERM, common.terminate)
  try:
    with pytest.raises(SystemExit) as ended:
      receive()
      time.sleep(10)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert ended.value.code == 143
