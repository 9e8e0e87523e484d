"""Whether a few-step LoRA of the base works on the adapted model.

The tiny base is distilled in its own latents. Its LoRA is merged into the model
that AE-Adapt-V made of the same base, without the parts of the interface.
"""

import json
import pathlib
from collections.abc import Sequence

from dcvideogen_jax import files
from dcvideogen_jax.tiny import chain, family

# In the base's own latents and its autoencoder's frames.
_OWN = (
  *("--config.space=base", "--config.model.patch=(1,2,2)"),
  *(f"--config.model.{x}_channels=16" for x in ("in", "out")),
  *(f"--config.{x}.keys=('base','text')" for x in ("data", "val.data")),
  "--config.evaluators.semantic.frames=13",
)
_FRAMES = {"base": 13, "lora": 16}
_FEW = ("--levels=1,0.9,0.75,0.5", "--solver=renoise", "--guidance=1")
_GUIDED = ("--steps=16", "--guidance=1", "--shift=3")
_TEACHER = ("--steps=16", "--guidance=3", "--shift=3")
_GUIDANCE_LORA, _FEW_LORA = "guidance_base/lora", "shipped/few_base"
# Title, model of `family.MODELS`, evaluations, LoRA, and how it is asked.
_ROWS = (
  ("base", "base", 32, "", _TEACHER),
  ("base, its guidance LoRA", "base", 16, _GUIDANCE_LORA, _GUIDED),
  ("base, its few-step LoRA", "base", 4, _FEW_LORA, _FEW),
  ("adapted", "lora", 32, "", _TEACHER),
  ("adapted, without guidance", "lora", 16, "", _GUIDED),
  ("adapted, the base's guidance LoRA", "lora", 16, _GUIDANCE_LORA, _GUIDED),
  ("adapted, at four levels", "lora", 4, "", _FEW),
  ("adapted, the base's few-step LoRA", "lora", 4, _FEW_LORA, _FEW),
)
_FACTS = ("all", "colour", "shape", "motion")


def stages() -> Sequence[chain.Stage]:
  """Returns the stages that follow those of `family.STAGES`."""
  asked = []
  for number, (_, model, _, lora, how) in enumerate(_ROWS):
    if lora:
      how = (*how, f"--lora={{work}}/{lora},1,skip=interface")
    output = f"transfer/{number}"
    asked.append(
      chain.Stage(
        output,
        f"{output}.json",
        "launch.evaluate",
        (
          "--what=semantic",
          f"--model={{work}}/models/{model}",
          f"--size={_FRAMES[model]},64,64",
          "--prompts=400",
          f"--output={{work}}/{output}.json",
          *how,
        ),
        "transfer",
      )
    )
  few = family.few("base", "base/model", *family.LATENTS, *family.BASE, *_OWN)
  return [*few, *asked]


def write(work: pathlib.Path) -> str:
  """Writes transfer/table.md from the scores, and returns it.

  Args:
    work: folder of the chain, in which all stages are done.
  """
  lines = [
    f"| model | evaluations | {' | '.join(_FACTS)} |",
    "|---|" + "---|" * (1 + len(_FACTS)),
  ]
  for number, (title, _, evaluations, *_) in enumerate(_ROWS):
    path = work / "transfer" / f"{number}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
    cells = [f"{100 * found[key]:.1f}" for key in _FACTS]
    lines.append(f"| {title} | {evaluations} | {' | '.join(cells)} |")
  table = "\n".join(lines) + "\n"
  with files.atomic(work / "transfer" / "table.md") as path:
    path.write_text(table, encoding="utf-8")
  return table
