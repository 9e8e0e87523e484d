#!/usr/bin/env bash
# lycoris-lora 4.1.3: merge_to scales LoKr and LoHa twice.
#
# A LyCORIS network adds its update times alpha / dim to what a layer gives.
# LycorisNetwork.merge_to writes the same update into the layer's weights, so
# that the merged layer should give what the trained one gave. It does for
# plain LoRA. For LoHa, and for LoKr with a factor that is decomposed, the
# factor alpha / dim is there twice: at alpha = dim / 2 half of the training is
# lost, and at alpha = 2 dim it is applied twice as strongly. Where alpha
# equals dim nothing is to be seen.
#
# It matters to those who train LoKr or LoHa on a video transformer and merge
# it for sampling: the merged model is another one than the one that was
# watched in training, and no message says so. This project scales plain LoRA
# of LyCORIS files by alpha / dim once and refuses LoKr and LoHa by their
# names; whoever merges those first, in order to use them here, meets this.
#
# Exits with 0 if LyCORIS does so, with 1 if that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lycoris-lora==4.1.3 torch==2.13.0

"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import logging
import sys

import torch

logging.disable(logging.CRITICAL)

from lycoris import LycorisNetwork, create_lycoris  # noqa: E402

WIDTH, DIM = 64, 4


class Attention(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.to_q = torch.nn.Linear(WIDTH, WIDTH, bias=False)

  def forward(self, x):
    return self.to_q(x)


@torch.no_grad()
def strength(algo, alpha, **options):
  """Norm of the merged update by that of the trained one, and what is left."""
  torch.manual_seed(0)
  model = torch.nn.Sequential(Attention())
  x = torch.randn(32, WIDTH)
  base = model(x)
  network = create_lycoris(
    model, 1.0, linear_dim=DIM, linear_alpha=alpha, algo=algo, **options
  )
  network.apply_to()
  for parameter in network.parameters():
    parameter.add_(0.2 * torch.randn_like(parameter))
  trained = model(x) - base
  network.restore()
  assert torch.equal(model(x), base)
  network.merge_to(1.0)
  merged = model(x) - base
  ratio = float(merged.norm() / trained.norm())
  rest = float((merged - ratio * trained).norm() / merged.norm())
  return ratio, rest


LycorisNetwork.apply_preset(
  {"enable_conv": False, "target_module": ["Attention"]}
)
version = importlib.metadata.version("lycoris-lora")
print(f"lycoris-lora {version}, torch {torch.__version__}")
print("merged update over trained update; expected 1 everywhere")
as_described = True
for algo, options in {"lora": {}, "loha": {}, "lokr": {"factor": 4}}.items():
  for alpha in (2, 4, 8):
    ratio, rest = strength(algo, alpha, **options)
    print(f"{algo}, alpha {alpha}, dim {DIM}: seen {ratio:.4f}")
    stated = 1 if algo == "lora" else alpha / DIM
    as_described &= abs(ratio - stated) < 1e-3 and rest < 1e-3
if not as_described:
  print("changed: this version does not do what is described above")
  sys.exit(1)
print("as described: LoHa and LoKr are scaled by alpha / dim once more")
PYTHON
