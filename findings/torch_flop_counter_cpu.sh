#!/usr/bin/env bash
# torch 2.13.0: its FLOP counter sees no attention on a CPU.
#
# FlopCounterMode has formulas for the attention kernels of GPUs, and none for
# the kernel that scaled_dot_product_attention runs on a CPU. Without a formula
# an operator counts as 0, and nothing says so. The same call counts its two
# products on the device "meta" and with the backend "math". Matrix products
# beside it count everywhere.
#
# It matters where the cost of a video transformer is counted: the share of
# attention grows with the tokens, so that the exponent is wrong too, and long
# videos seem cheap. `benchmarks/` counts torch's FLOPs with the backend "math".
#
# Exits with 0 if torch does so, with 1 if that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.0

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn import attention
from torch.utils import flop_counter

print("torch", torch.__version__)
TOKENS, WIDTH = 64, 16


def count(device="cpu", backend=None):
  """Returns the FLOPs that are counted in one attention of one head."""
  q, k, v = torch.ones(3, 1, 1, TOKENS, WIDTH, device=device)
  with flop_counter.FlopCounterMode(display=False) as counter:
    if backend is None:
      torch.nn.functional.scaled_dot_product_attention(q, k, v)
    else:
      with attention.sdpa_kernel(backend):
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
  return counter.get_total_flops()


expected = 2 * 2 * TOKENS**2 * WIDTH  # Two products.
seen = {
  "cpu": count(),
  "cpu, backend math": count(backend=attention.SDPBackend.MATH),
  "meta": count("meta"),
}
print(f"expected: {expected} FLOPs each")
print("seen:", seen)
if [*seen.values()] != [0, expected, expected]:
  print("changed: this version does not do what is described above")
  sys.exit(1)
print("as described: attention on a CPU is not counted")
PYTHON
