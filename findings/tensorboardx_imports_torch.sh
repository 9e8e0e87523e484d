#!/usr/bin/env bash
# tensorboardX 2.6.5: writing one scalar imports torch wherever it is installed.
#
# tensorboardX exists so that programs without torch can write TensorBoard's
# events, and it does not require torch. Yet any import of the package, also of
# its low-level modules event_file_writer and summary, runs `import torch` and
# ignores the error if there is none. Where torch is installed, every process
# that writes events imports it whole: with torch 2.13.0 that is seconds and
# hundreds of megabytes at each start.
#
# It matters in training with jax because torch is often installed beside it to
# convert weights. A training that is killed and started again pays each time,
# and so does each process of a pod. This project imports tensorboardX with
# torch hidden (dcvideogen_jax/report.py), and a test says that no torch is
# imported.
#
# A module named torch that only says that it is imported stands for torch here,
# which keeps the download small.
#
# Exits with 0 if tensorboardX does so, with 1 if that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorboardX==2.6.5 numpy==2.4.0 \
  protobuf==6.33.2
mkdir "$folder/stand_in"
echo 'Tensor = type("Tensor", (), {})' > "$folder/stand_in/torch.py"

PYTHONPATH="$folder/stand_in" "$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys
import tempfile

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

print("tensorboardX", importlib.metadata.version("tensorboardX"))
writer = event_file_writer.EventsWriter(tempfile.mkdtemp() + "/events")
writer.write_event(event_pb2.Event(step=1, summary=summary.scalar("loss", 0.5)))
writer.close()
requires = importlib.metadata.requires("tensorboardX") or []
print("requires:", ", ".join(requires))
imported = "torch" in sys.modules
print("expected: a scalar is written without importing torch")
print("seen: torch imported:", imported)
if not imported or any(x.startswith("torch") for x in requires):
  print("changed: this version does not do what is described above")
  sys.exit(1)
print("as described: torch is imported and is not required")
PYTHON
