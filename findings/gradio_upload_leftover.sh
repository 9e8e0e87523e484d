#!/usr/bin/env bash
# gradio 6.31.0: each upload with gr.UploadButton leaves an empty file behind.
#
# A listener of an UploadButton gets the name of the uploaded file. To make the
# object that carries the name, Gradio opens a temporary file with
# delete=False, gives the object another name, and forgets the file. It stays in
# GRADIO_TEMP_DIR (/tmp/gradio) after the upload itself was removed.
#
# It matters in `dcvideogen app`, which promises that uploads are removed. Its
# listeners have preprocess=False and check the path themselves.
#
# Exits with 0 if gradio does so, with 1 if that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gradio==6.31.0

export GRADIO_TEMP_DIR="$folder/uploads" GRADIO_ANALYTICS_ENABLED=False
"$folder/venv/bin/python" - <<'PYTHON'
import os
import pathlib
import sys

import gradio

uploads = pathlib.Path(os.environ["GRADIO_TEMP_DIR"])
(uploads / "hash").mkdir(parents=True)
button = gradio.UploadButton()
for i in range(3):
  upload = uploads / "hash" / f"{i}.png"
  upload.write_bytes(b"content")
  name = button.preprocess(gradio.FileData(path=str(upload)))
  assert name == str(upload)
  upload.unlink()  # What a listener that cleans up does.

left = [path for path in uploads.rglob("*") if path.is_file()]
print("expected: no file is left after three uploads that were removed")
print(f"seen: {len(left)} files of {sum(x.stat().st_size for x in left)} bytes")
if len(left) != 3:
  print("changed: this version does not do what is described above")
  sys.exit(1)
print("as described: each upload leaves an empty file")
PYTHON
