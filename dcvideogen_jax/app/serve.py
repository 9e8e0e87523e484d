"""Serves the page, and the files that it shows, to this machine."""

import contextlib
import os
import pathlib
import socket
from typing import Any

from dcvideogen_jax import errors
from dcvideogen_jax.app import history, snippets
from dcvideogen_jax.app import studio as studio_lib

# The first ports that are tried, as for other pages of Gradio.
PORTS = range(7860, 7960)
_PREVIEWS = "previews"


def prepare(scratch: pathlib.Path) -> None:
  """Sets what Gradio reads from the environment; comes before its import.

  Args:
    scratch: gets uploads.

  Raises:
    errors.UserError: if Gradio is not installed.
  """
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
  os.environ["GRADIO_TEMP_DIR"] = str(scratch / "uploads")
  os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
  try:
    import gradio  # noqa: F401
  except ImportError as e:
    raise errors.UserError(
      "the page needs Gradio, which is not installed: pip install"
      f" 'dcvideogen_jax[app]' ({e})"
    ) from e


def listen(host: str, port: int | None) -> socket.socket:
  """Returns a socket that listens.

  Args:
    host: the address, such as "127.0.0.1".
    port: its port; None is the first free one of `PORTS`.

  Raises:
    errors.UserError: if the address or the port cannot be used.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  reason = ""
  for number in PORTS if port is None else [port]:
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      found.bind((host, number))
      found.listen(128)
      return found
    except (OSError, OverflowError) as e:
      found.close()
      reason = getattr(e, "strerror", None) or str(e)
  ports = f"{PORTS[0]} to {PORTS[-1]}" if port is None else port
  raise errors.UserError(f"cannot listen on {host}, port {ports}: {reason}")


def application(
  studio: studio_lib.Studio, blocks: Any, most_bytes: int | None = None
) -> Any:
  """Returns the ASGI application: the page and the files of its videos.

  Files are served by name from three places only: videos with a report in the
  output folder, reconstructions below it, and previews.

  Args:
    studio: has the folders.
    blocks: the page.
    most_bytes: largest upload; None is no limit.
  """
  import fastapi
  import gradio as gr

  app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

  def file(path: pathlib.Path, exists: bool) -> Any:
    if not exists or not path.is_file():
      raise fastapi.HTTPException(404)
    return fastapi.responses.FileResponse(path)

  @app.get("/made/{name}")
  def made(name: str):
    found = history.is_made(studio.output, name)
    return file(studio.output / name, found)

  @app.get("/reconstruction/{folder}/{name}")
  def reconstruction(folder: str, name: str):
    path = studio.output / "reconstructions" / folder / name
    return file(path, _plain(folder, name))

  @app.get("/preview/{folder}/{name}")
  def preview(folder: str, name: str):
    path = studio.scratch / _PREVIEWS / folder / name
    return file(path, _plain(folder, name))

  return gr.mount_gradio_app(
    app,
    blocks,
    "/",
    theme=gr.themes.Default(font=snippets.FONTS, font_mono=snippets.MONO),
    css=snippets.CSS,
    footer_links=[],
    run_history=False,
    ssr_mode=False,
    mcp_server=False,
    show_error=False,
    max_file_size=most_bytes,
  )


def run(app: Any, listening: socket.socket) -> None:
  """Serves until the process is interrupted; then raises what Python does.

  Args:
    app: of `application`.
    listening: of `listen`.
  """
  import uvicorn

  config = uvicorn.Config(
    app, log_level="warning", timeout_graceful_shutdown=1, ws="none"
  )
  with contextlib.closing(listening):
    uvicorn.Server(config).run(sockets=[listening])


def _plain(*names: str) -> bool:
  """Whether names are those of files or folders that are not hidden."""
  return all(
    pathlib.Path(name).name == name and not name.startswith(".")
    for name in names
  )
