#!/usr/bin/env bash
# vbench 0.1.5: one other file in the folder can make all videos missing.
#
# VBench looks for the videos of its prompts as PROMPT-K and a suffix, and takes
# the suffix of the first name that os.listdir gives for the folder. The order
# of names is the file system's. If the first name is that of a folder or of a
# file of settings, no video is found; VBench prints a warning for each, goes
# on, and fails or scores nothing.
#
# It matters in sampling for VBench because programs like to write settings
# beside each video. This project writes them into a folder of their own, and
# `dcvideogen evaluate vbench-folder` names whatever else is among the videos.
#
# The script lets os.listdir sort the names, so that it shows the same on every
# file system. Libraries that VBench imports but does not need here, such as
# torch, are replaced by empty ones.
#
# Exits with 0 if vbench does so, with 1 if that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps vbench==0.1.5

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import json
import os
import pathlib
import sys
import unittest.mock

for name in (
  *("numpy", "torch", "torch.distributed", "decord", "torchvision", "PIL"),
  *("torchvision.transforms", "cv2"),
):
  sys.modules[name] = unittest.mock.MagicMock()
sys.modules["torch"].distributed.is_initialized.return_value = False

import vbench

listdir = os.listdir
os.listdir = lambda path: sorted(listdir(path))


def found(names):
  """The videos that VBench finds in a folder with these files."""
  videos = pathlib.Path("videos")
  videos.mkdir()
  for name in names:
    (videos / name).touch()
  row = {"prompt_en": "b", "dimension": ["scene"]}
  pathlib.Path("info.json").write_text(json.dumps([row]))
  with contextlib.redirect_stdout(io.StringIO()):
    bench = vbench.VBench("cpu", "info.json", "results")
    path = bench.build_full_info_json("videos", "x", ["scene"])
  for name in names:
    (videos / name).unlink()
  videos.rmdir()
  (row,) = json.loads(pathlib.Path(path).read_text())
  return len(row["video_list"])


videos = [f"b-{k}.mp4" for k in range(5)]
print("expected: 5 videos are found, whatever else is in the folder")
counts = [found([*videos, *more]) for more in ([], ["z.json"], ["a.json"])]
for count, what in zip(
  counts,
  ("alone", "before a .json in the list", "after a .json in the list"),
  strict=True,
):
  print(f"seen: videos {what}: {count} found")
if counts != [5, 5, 0]:
  print("changed: this version does not do what is described above")
  sys.exit(1)
print("as described: the first name's suffix decides")
PYTHON
