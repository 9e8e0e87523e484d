#!/usr/bin/env bash
# OpenCV 5.0.0.93: frames are the stored pixels, and untagged colours are BT.601.
#
# A video may have pixels that are not square, and players show it in the right
# shape; cv2.VideoCapture returns the stored pixels. A video of high definition
# without a tag of its colours is BT.709 for players; cv2.VideoCapture converts
# it by BT.601, as FFmpeg does by default.
#
# It matters because most evaluations of video models, the official one of
# DC-AE-V among them, read their clips with OpenCV: a reader that does what
# players do measures other pixels. Here `evaluate reconstruction` takes
# OpenCV's, and the other programs the players'.
#
# Exits with 0 if OpenCV does so, with 1 if that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
  opencv-python-headless==5.0.0.93 av==18.0.0 numpy

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import fractions
import sys

import av
import cv2
import numpy as np
from av.video.reformatter import Colorspace

# Red, which the two matrices convert furthest apart.
red = np.zeros((720, 1280, 3), np.uint8)
red[..., 0] = 200
with av.open("red.mp4", "w") as container:
  stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
  stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
  stream.sample_aspect_ratio = fractions.Fraction(3, 2)
  frame = av.VideoFrame.from_ndarray(red)
  frame = frame.reformat(
    format="yuv420p", dst_colorspace=Colorspace.ITU709
  )
  container.mux(stream.encode(frame))
  container.mux(stream.encode())

_, seen = cv2.VideoCapture("red.mp4").read()
print("expected of a player: 720 x 1920, red 200")
level = int(seen[..., 2].mean().round())
print(f"seen: {seen.shape[0]} x {seen.shape[1]}, red {level}")
if seen.shape[1] != 1280 or abs(level - 200) < 8:
  print("changed: this version does not do what is described above")
  sys.exit(1)
print("as described: stored pixels, and another matrix")
PYTHON
