"""What each open tab of the page has: its upload and its run."""

import contextlib
import pathlib
import secrets
import shutil
import threading
from typing import Any

import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.app import runs
from dcvideogen_jax.sample import request_list


class Tab:
  """One open tab.

  Attributes:
    image: first frame, uint8 (h, w, 3), or None.
    image_name: name of its file, as the user knows it.
    video: file to reconstruct, or None.
    video_name: its name, as the user knows it.
    run: what the tab waits for, or None.
  """

  def __init__(self, directory: pathlib.Path, uploads: pathlib.Path):
    """Begins without uploads.

    Args:
      directory: for uploads that are files; made when there is one.
      uploads: where Gradio puts uploads.
    """
    self.image: np.ndarray | None = None
    self.image_name = ""
    self.video: pathlib.Path | None = None
    self.video_name = ""
    self.run: runs.Run | None = None
    self._directory, self._uploads = directory, uploads

  def take_image(self, upload: Any) -> None:
    """Reads an uploaded image, and removes the file whatever it is.

    Args:
      upload: what the browser says about it.

    Raises:
      errors.UserError: if it is not an image that can be read.
    """
    path = self._uploaded(upload)
    try:
      image = request_list.read_image(str(path))
    except errors.UserError as e:
      raise _named(e, str(path), path.name) from e
    finally:
      _remove(path)
    self.image, self.image_name = image, path.name

  def drop_image(self) -> None:
    """Forgets the image."""
    self.image, self.image_name = None, ""

  def take_video(self, upload: Any) -> None:
    """Takes over an uploaded video; one that was taken before is removed.

    Args:
      upload: what the browser says about it.

    Raises:
      errors.UserError: if it is no upload.
    """
    path = self._uploaded(upload)
    self.drop_video()
    self._directory.mkdir(exist_ok=True)
    self.video_name = path.name
    self.video = self._directory / f"{secrets.token_hex(4)}{path.suffix}"
    shutil.move(path, self.video)
    _remove(path)

  def drop_video(self) -> None:
    """Removes the video."""
    if self.video is not None:
      self.video.unlink(missing_ok=True)
    self.video, self.video_name = None, ""

  def close(self) -> None:
    """Cancels the run, and removes the uploads."""
    if self.run is not None:
      self.run.cancel()
    self.drop_image()
    self.drop_video()
    shutil.rmtree(self._directory, ignore_errors=True)

  def _uploaded(self, upload: Any) -> pathlib.Path:
    """Returns the path of an upload.

    A browser could name any file of this machine.

    Raises:
      errors.UserError: if it is not below the folder of uploads.
    """
    path = pathlib.Path(str(upload["path"])).resolve()
    if not path.is_relative_to(self._uploads.resolve()) or not path.is_file():
      raise errors.UserError(f"{path.name} is no upload")
    return path

  def about_upload(self, error: errors.UserError) -> str:
    """Returns an error's sentence with the name that the user knows."""
    return str(_named(error, str(self.video), self.video_name))


class Tabs:
  """The open tabs by the name that Gradio gives their sessions."""

  def __init__(self, directory: pathlib.Path):
    """Begins without tabs.

    Args:
      directory: gets a folder for each tab with files, beside Gradio's folder
        "uploads".
    """
    self._directory, self._uploads = directory, directory / "uploads"
    self._open: dict[str, Tab] = {}
    self._lock = threading.Lock()

  def of(self, request: Any) -> Tab:
    """Returns the tab of a request of Gradio."""
    key = request.session_hash
    with self._lock:
      if key not in self._open:
        folder = self._directory / secrets.token_hex(8)
        self._open[key] = Tab(folder, self._uploads)
      return self._open[key]

  def close(self, request: Any) -> None:
    """Forgets the tab of a request of Gradio, with all it has."""
    with self._lock:
      tab = self._open.pop(request.session_hash, None)
    if tab is not None:
      tab.close()

  def __len__(self) -> int:
    return len(self._open)


def _named(error: errors.UserError, path: str, name: str) -> errors.UserError:
  """Returns an error with a file's own name in place of its upload's path."""
  return errors.UserError(str(error).replace(path, name))


def _remove(path: pathlib.Path) -> None:
  """Removes an upload, and the folder that Gradio made for it alone."""
  path.unlink(missing_ok=True)
  with contextlib.suppress(OSError):  # The same content may be there twice.
    path.parent.rmdir()
