"""An object store on this machine, for paths that begin with gs://.

There are two ways in, as in reality: etils and jax come through fsspec, and
TensorStore, which Orbax writes arrays with, over HTTP. What a bucket cannot do
fails here too: nothing is appended, and a directory is but a part of names.
"""

import functools
import http.server
import io
import json
import os
import re
import threading
import urllib.parse

import fsspec
import pytest
from orbax.checkpoint._src.path import gcs_utils


class Bucket:
  """Objects by name, each with the number of its writing."""

  def __init__(self):
    self.objects: dict[str, bytes] = {}
    self._generations: dict[str, int] = {}
    self._lock = threading.Lock()

  def write(self, name: str, data: bytes, after: int | None = None) -> int:
    """Replaces an object; 0 if it is not of the generation `after`."""
    with self._lock:
      current = self.generation(name)
      if after is not None and after != current:
        return 0
      self.objects[name] = data
      self._generations[name] = self._generations.get(name, 0) + 1
      return self._generations[name]

  def generation(self, name: str) -> int:
    return self._generations[name] if name in self.objects else 0

  def under(self, prefix: str) -> list[str]:
    return sorted(
      name for name in list(self.objects) if name.startswith(prefix)
    )


class _Written(io.BytesIO):
  """Becomes an object when it is closed."""

  def __init__(self, bucket: Bucket, name: str):
    super().__init__()
    self._bucket, self._name = bucket, name

  def close(self) -> None:
    if not self.closed:
      self._bucket.write(self._name, self.getvalue())
    super().close()


class FileSystem(fsspec.AbstractFileSystem):
  """The bucket as fsspec sees it; stands for gcsfs."""

  protocol = ("gs", "gcs")
  cachable = False
  bucket = Bucket()

  def info(self, path, **kwargs):
    name = self._strip_protocol(path)
    if name in self.bucket.objects:
      size = len(self.bucket.objects[name])
      return {"name": name, "size": size, "type": "file"}
    if self.bucket.under(name + "/"):
      return {"name": name, "size": 0, "type": "directory"}
    raise FileNotFoundError(path)

  def ls(self, path, detail=True, **kwargs):
    name = self._strip_protocol(path)
    if name in self.bucket.objects:
      found = [name]
    else:
      start = len(name) + 1
      found = sorted(
        {
          name + "/" + x[start:].split("/")[0]
          for x in self.bucket.under(name + "/")
        }
      )
    if not found:
      raise FileNotFoundError(path)
    return [self.info(x) for x in found] if detail else found

  def _open(self, path, mode="rb", **kwargs):
    name = self._strip_protocol(path)
    if mode == "wb":
      return _Written(self.bucket, name)
    if mode != "rb":
      raise NotImplementedError(f"objects cannot be opened as {mode!r}")
    if name not in self.bucket.objects:
      raise FileNotFoundError(path)
    return io.BytesIO(self.bucket.objects[name])

  def mkdir(self, path, create_parents=True, **kwargs):
    pass

  def makedirs(self, path, exist_ok=False):
    pass

  def rmdir(self, path):
    pass

  def cp_file(self, path1, path2, **kwargs):
    name = self._strip_protocol(path1)
    if name in self.bucket.objects:
      self.bucket.write(self._strip_protocol(path2), self.bucket.objects[name])

  def rm_file(self, path):
    self.bucket.objects.pop(self._strip_protocol(path), None)


class _Api(http.server.BaseHTTPRequestHandler):
  """What TensorStore uses of the JSON API of Cloud Storage."""

  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    pass

  def _asked(self):
    """Name of the object, or of its bucket, and the query."""
    url = urllib.parse.urlsplit(self.path)
    query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
    found = re.fullmatch(r".*/storage/v1/b/([^/]+)/o/?([^/]*)", url.path)
    name = urllib.parse.unquote(found[2]) or query.get("name", "")
    return f"{found[1]}/{name}", query

  def _answer(self, status, body=b"", generation=0):
    self.send_response(status)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("x-goog-generation", str(generation))
    self.end_headers()
    self.wfile.write(body)

  def _describe(self, name):
    return {
      "name": name.partition("/")[2],
      "size": str(len(FileSystem.bucket.objects[name])),
      "generation": str(FileSystem.bucket.generation(name)),
    }

  def do_GET(self):  # noqa: N802
    name, query = self._asked()
    bucket = FileSystem.bucket
    if name.endswith("/") and "alt" not in query:
      found = [self._describe(x) for x in bucket.under(name)]
      found = [x for x in found if x["name"] >= query.get("startOffset", "")]
      if end := query.get("endOffset"):
        found = [x for x in found if x["name"] < end]
      self._answer(200, json.dumps({"items": found}).encode())
      return
    data = bucket.objects.get(name)
    generation = bucket.generation(name)
    if data is None:
      self._answer(404)
    elif query.get("ifGenerationNotMatch") == str(generation):
      self._answer(304, generation=generation)
    elif part := re.fullmatch(
      r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")
    ):
      start, end = int(part[1]), int(part[2] or len(data) - 1)
      self._answer_part(data, start, min(end, len(data) - 1), generation)
    else:
      self._answer(200, data, generation)

  def _answer_part(self, data, start, end, generation):
    self.send_response(206)
    self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
    self.send_header("Content-Length", str(end + 1 - start))
    self.send_header("x-goog-generation", str(generation))
    self.end_headers()
    self.wfile.write(data[start : end + 1])

  def do_POST(self):  # noqa: N802
    name, query = self._asked()
    data = self.rfile.read(int(self.headers["Content-Length"]))
    after = query.get("ifGenerationMatch")
    written = FileSystem.bucket.write(name, data, after and int(after))
    if written:
      self._answer(200, json.dumps(self._describe(name)).encode(), written)
    else:
      self._answer(412)

  def do_DELETE(self):  # noqa: N802
    name, _ = self._asked()
    found = FileSystem.bucket.objects.pop(name, None)
    self._answer(404 if found is None else 204)


@functools.cache
def _serve() -> http.server.ThreadingHTTPServer:
  """Starts the server, once: TensorStore looks only once where it is."""
  fsspec.register_implementation("gs", FileSystem, clobber=True)
  fsspec.register_implementation("gcs", FileSystem, clobber=True)
  server = http.server.ThreadingHTTPServer(("localhost", 0), _Api)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f"http://localhost:{server.server_port}"
  os.environ["TENSORSTORE_GCS_HTTP_URL"] = address
  os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
  return server


@pytest.fixture
def bucket(monkeypatch) -> dict[str, bytes]:
  """What lies behind gs://, by name without the scheme; empty at first."""
  _serve()
  # Orbax asks Google's own client, which tests do without.
  monkeypatch.setattr(
    gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False
  )
  FileSystem.bucket.objects.clear()
  return FileSystem.bucket.objects
