"""Files and directories appear whole; what killed processes leave goes."""

import errno
import os
import pathlib
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from dcvideogen_jax import errors, files, leftovers

ROOT = pathlib.Path(__file__).parents[1]
# Writes a file and a directory, and is killed in the middle.
WRITER = """
import os, pathlib, sys, time
from dcvideogen_jax import files
place = pathlib.Path(sys.argv[1])
with (
  files.atomic(place / "a.txt") as file,
  files.atomic_directory(place / "b") as directory,
  files.lock(place / ".lock") as locked,
):
  file.write_text("half")
  (directory / "c").write_text("half")
  print(locked, flush=True)
  time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
  """A process that is writing into the directory."""
  process = subprocess.Popen(
    [sys.executable, "-c", WRITER, tmp_path],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()


def _names(directory):
  return sorted(path.name for path in directory.iterdir())


def test_what_a_killed_process_leaves_goes_and_what_a_living_one_writes_stays(
  tmp_path, writer
):
  writing = _names(tmp_path)
  assert len(writing) == 3
  with files.atomic(tmp_path / "other.txt") as temporary:
    temporary.write_text("whole")
  assert _names(tmp_path) == [*writing, "other.txt"]
  with files.lock(tmp_path / ".lock") as locked:
    assert not locked
  writer.send_signal(signal.SIGKILL)
  writer.wait()
  with files.atomic(tmp_path / "other.txt") as temporary:
    temporary.write_text("whole")
  assert _names(tmp_path) == [".lock", "other.txt"]
  with files.lock(tmp_path / ".lock") as locked:
    assert locked
  assert _names(tmp_path) == ["other.txt"]


def test_what_other_machines_left_goes_after_a_day(tmp_path):
  """Their locks may not be seen here, so they are given time."""
  foreign = tmp_path / ".new-fedcba-01234567-b"
  foreign.mkdir()
  (foreign / "c").write_text("half")
  (tmp_path / ".newer").write_text("a user's own")
  leftovers.sweep(tmp_path)
  assert _names(tmp_path) == [foreign.name, ".newer"]
  yesterday = time.time() - 25 * 3600
  for path in (foreign / "c", foreign):
    os.utime(path, (yesterday, yesterday))
  leftovers.sweep(tmp_path)
  assert _names(tmp_path) == [".newer"]


def test_without_locks_nothing_is_swept_at_once(tmp_path, monkeypatch, caplog):
  """As on NFS, where directories cannot be locked, or Lustre."""

  def fail(*args):
    raise OSError(errno.ENOSYS, "Function not implemented")

  left = tmp_path / f".new-{leftovers.machine()}-01234567-a.txt"
  left.write_text("half")
  monkeypatch.setattr(leftovers.fcntl, "flock", fail)
  with files.atomic(tmp_path / "a.txt") as temporary:
    temporary.write_text("whole")
  assert _names(tmp_path) == [left.name, "a.txt"]
  with (
    files.lock(tmp_path / ".lock") as one,
    files.lock(tmp_path / ".lock") as other,
  ):
    assert one and other
  assert "knows no locks" in caplog.text


def test_another_file_is_not_blamed_on_the_one_that_is_written(tmp_path):
  target = tmp_path / "out.txt"
  for context in (files.atomic(target), files.atomic_directory(target)):
    with pytest.raises(FileNotFoundError) as e, context:
      (tmp_path / "source.txt").read_text()
    assert e.value.filename == str(tmp_path / "source.txt")
  with pytest.raises(errors.UserError) as e, files.atomic(target) as temporary:
    temporary.rename(tmp_path / "moved")
    temporary.read_text()
  assert str(e.value) == f"cannot write {target}: No such file or directory"
  (tmp_path / "moved").unlink()
  assert not _names(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told(tmp_path, number):
  target = tmp_path / "out.txt"
  target.write_text("before")
  with (
    pytest.raises(errors.UserError, match=f"cannot write {target}: "),
    files.atomic(target),
  ):
    raise OSError(number, os.strerror(number))  # Writes name no file.
  assert _names(tmp_path) == ["out.txt"]
  assert target.read_text() == "before"


def test_threads_leave_the_umask_as_it_is(tmp_path):
  """To ask for the umask is to change it, for all threads."""
  before = os.umask(0o027)
  try:

    def write(number):
      for _ in range(200):
        with files.atomic(tmp_path / f"{number}.txt") as temporary:
          temporary.write_text("x")

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    with files.atomic_directory(tmp_path / "directory") as directory:
      (directory / "file").write_text("x")
    with files.atomic(tmp_path / "private.txt", 0o600):
      pass
    after = os.umask(0o027)
  finally:
    os.umask(before)
  assert after == 0o027
  modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
  assert modes == {
    "0.txt": 0o640,
    "1.txt": 0o640,
    "directory": 0o750,
    "private.txt": 0o600,
  }


@pytest.fixture
def flushed(monkeypatch):
  """Names of what is flushed to the disk, and of what gets its name."""
  seen = []
  fsync, replace, rename = os.fsync, os.replace, os.rename

  def flush(handle):
    seen.append(pathlib.Path(os.readlink(f"/proc/self/fd/{handle}")).suffix)
    fsync(handle)

  def move(function):
    def moved(one, other):
      seen.append(f"-> {pathlib.Path(other).name}")
      function(one, other)

    return moved

  monkeypatch.setattr(os, "fsync", flush)
  monkeypatch.setattr(os, "replace", move(replace))
  monkeypatch.setattr(os, "rename", move(rename))
  return seen


def test_what_gets_its_name_is_on_the_disk(tmp_path, flushed):
  """Or a power cut leaves an empty file under the right name."""
  directory = tmp_path / "run.d"
  directory.mkdir()
  with files.atomic(directory / "a.json") as temporary:
    temporary.write_text("x")
  assert flushed == [".json", "-> a.json", ".d"]
  flushed.clear()
  with files.atomic_directory(directory / "b.parts") as temporary:
    (temporary / "c.txt").write_text("x")
  assert flushed == [".txt", ".parts", "-> b.parts", ".d"]
  flushed.clear()
  with files.atomic_files(directory, last=".mp4") as temporary:
    for name in ("e.mp4", "d.json", "f.png"):
      (temporary / name).write_text(name)
  assert flushed[3:] == ["-> d.json", "-> f.png", "-> e.mp4", ".d"]
  assert _names(directory) == ["a.json", "b.parts", "d.json", "e.mp4", "f.png"]


def test_a_directory_that_is_swept_before_it_is_opened(tmp_path, monkeypatch):
  """By another thread, which takes it for one of a killed process."""
  swept, real = [], os.open

  def sweeping(where, *args, **kwargs):
    path = pathlib.Path(where)
    if path.name.startswith(leftovers.PREFIX) and not swept:
      swept.append(path)
      path.rmdir()
    return real(where, *args, **kwargs)

  monkeypatch.setattr(os, "open", sweeping)
  with files.atomic_directory(tmp_path / "a") as directory:
    (directory / "x").write_text("y")
  assert swept and (tmp_path / "a" / "x").read_text() == "y"


def test_a_directory_that_is_there_already(tmp_path):
  for keep in (False, True):
    (tmp_path / "a").mkdir(exist_ok=True)
    with files.atomic_directory(tmp_path / "a", keep) as directory:
      (directory / "new").write_text("x")
    assert _names(tmp_path / "a") == ["new"]
    (tmp_path / "a" / "new").rename(tmp_path / "a" / "old")
    if keep:
      with files.atomic_directory(tmp_path / "a", keep) as directory:
        (directory / "new").write_text("x")
    else:
      with (
        pytest.raises(errors.UserError, match="cannot write .*not empty"),
        files.atomic_directory(tmp_path / "a", keep) as directory,
      ):
        (directory / "new").write_text("x")
    assert _names(tmp_path) == ["a"] and _names(tmp_path / "a") == ["old"]
    (tmp_path / "a" / "old").unlink()


def test_one_cache_for_all(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
  assert files.cache_directory() == tmp_path / "x" / "dcvideogen_jax"
  monkeypatch.setenv(files.CACHE_VARIABLE, "~/c")
  assert files.cache_directory() == pathlib.Path.home() / "c"
