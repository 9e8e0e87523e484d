#!/usr/bin/env bash
# peft 0.21.2: the order of alpha_pattern is lost when an adapter is saved.
#
# Where several entries of LoraConfig.alpha_pattern match one module, PEFT
# takes the first of them in the order in which they were given.
# save_pretrained writes adapter_config.json with sorted keys, so that after
# from_pretrained another entry can be the first one. The factors are loaded
# unchanged and are scaled by another alpha, without a warning: the loaded
# model is not the trained one.
#
# It matters for LoRA of video transformers because their blocks repeat the
# same names, so that "this block, then all the others" is how such a
# configuration is written. The saved file cannot say which order was trained.
# This project takes the first entry in the file, as PEFT does when it loads
# it, and warns where several that differ match one module.
#
# Exits with 0 if PEFT does so, with 1 if that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.13.0

"$folder/venv/bin/python" - "$folder/adapter" <<'PYTHON'
import json
import pathlib
import sys

import peft
import torch

FOLDER = pathlib.Path(sys.argv[1])
# The one block first, then all of them.
ALPHA = {"blocks.0.attn.to_q": 16, "attn.to_q": 8}


def transformer():
  torch.manual_seed(0)
  blocks = torch.nn.ModuleList()
  for _ in range(2):
    attention = torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 16)})
    blocks.append(torch.nn.ModuleDict({"attn": attention}))
  return torch.nn.ModuleDict({"blocks": blocks})


def queries(model):
  blocks = model.base_model.model["blocks"]
  return [b["attn"]["to_q"](X).detach() for b in blocks]


def scales(model):
  blocks = model.base_model.model["blocks"]
  return [b["attn"]["to_q"].scaling["default"] for b in blocks]


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
config = peft.LoraConfig(
  r=4, lora_alpha=4, target_modules=["to_q"], alpha_pattern=ALPHA
)
trained = peft.get_peft_model(transformer(), config)
for name, x in trained.named_parameters():
  if "lora_" in name:
    torch.nn.init.normal_(x)
trained.save_pretrained(FOLDER)
loaded = peft.PeftModel.from_pretrained(transformer(), FOLDER)

written = json.loads((FOLDER / "adapter_config.json").read_text())
print(f"peft {peft.__version__}, torch {torch.__version__}")
print("alpha_pattern as given: ", list(ALPHA))
print("alpha_pattern as saved: ", list(written["alpha_pattern"]))
print("alpha / r of the blocks, trained:", scales(trained))
print("expected after loading:          ", scales(trained))
print("seen after loading:              ", scales(loaded))
gaps = [
  float((a - b).abs().max())
  for a, b in zip(queries(trained), queries(loaded), strict=True)
]
print("largest differences of the outputs:", [round(x, 3) for x in gaps])
same = scales(trained) == [4.0, 2.0] and scales(loaded) == [2.0, 2.0]
if not same or gaps[0] < 0.1 or gaps[1] > 1e-4:
  print("changed: this version does not do what is described above")
  sys.exit(1)
print("as described: the first block is another one after loading")
PYTHON
