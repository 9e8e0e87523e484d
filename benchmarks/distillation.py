"""Few steps by either kind of distillation, from the tiny models that ship.

The text-to-video model is distilled by each kind and for several seeds, the
image-to-video model by distribution matching. All are asked the same held-out
prompts with the same initial noise.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dcvideogen_jax import files
from dcvideogen_jax.tiny import chain

_ASSETS = "dcvideogen_jax/assets"
_TINY = f"{_ASSETS}/dcvideogen_tiny"
_WORK = "{work}/distillation"
# Steps of the phase `few` by kind, which cost about as many evaluations of the
# transformer: 12 and 7 a step.
KINDS: Mapping[str, tuple[int, str]] = {
  "matching": (300, "renoise"),
  "consistency": (514, "euler"),
}
_LEVELS = "1,0.9,0.75,0.5"
_TEACHER = ("--steps=16", "--guidance=3", "--shift=3")
_GUIDED = ("--steps=16", "--guidance=1", "--shift=3")
_FACTS = ("all", "colour", "shape", "motion")
_SPREAD = ("position", "size")


def stages(seeds: Sequence[str]) -> list[chain.Stage]:
  """Returns the stages of both tasks, from the encoding of clips on."""
  return [
    _encoded("latents", 10560, "wan"),
    _encoded("heldout_latents", 400, "wan", "--split=heldout"),
    _encoded("negative_i2v", 1, "wan_i2v"),
    *_task("t2v", seeds, tuple(KINDS)),
    *_task("i2v", seeds[:1], ("matching",)),
  ]


def _encoded(name: str, clips: int, negative: str, *more: str) -> chain.Stage:
  output = f"distillation/{name}"
  return chain.Stage(
    output,
    f"{output}/index.json",
    "launch.precompute",
    (
      f"--world={clips}",
      "--model=tiny",
      f"--negative_prompt={negative}",
      *("--i2v", "--text_tokens=32", "--frames=16", "--bucket=64x64"),
      *("--batch=16", "--part=512"),
      f"--output={{work}}/{output}",
      *more,
    ),
    "encoded",
  )


def _task(
  task: str, seeds: Sequence[str], kinds: Sequence[str]
) -> Iterator[chain.Stage]:
  yield from _asked(task, "teacher", *_TEACHER)
  for seed in seeds:
    guidance = f"{task}_guidance_{seed}"
    yield _train(task, "guidance", guidance, seed)
    yield _exported(guidance)
    yield from _asked(task, f"guidance_{seed}", *_GUIDED, lora=guidance)
    for kind in kinds:
      steps, solver = KINDS[kind]
      name = f"{task}_{kind}_{seed}"
      yield _train(
        task,
        "few",
        name,
        seed,
        f"--config.distil.kind={kind}",
        f"--config.distil.lora={_WORK}/{guidance}/lora",
        f"--config.steps={steps}",
        "--config.val.every=50",
        "--config.evaluators.semantic.every=50",
      )
      yield _exported(name)
      how = (f"--levels={_LEVELS}", f"--solver={solver}", "--guidance=1")
      yield from _asked(task, f"{kind}_{seed}", *how, lora=name)


def _train(
  task: str, phase: str, name: str, seed: str, *more: str
) -> chain.Stage:
  parts = {"text_encoder": _TINY, "tokenizer": _TINY}
  if task == "i2v":
    parts["image_encoder"] = _TINY
    more += (f"--config.negative={_WORK}/negative_i2v",)
  return chain.train(
    f"distillation/{name}",
    f"configs/adapt.py:tiny_{task},phase={phase}",
    f"--config.start.weights={_TINY}/transformer_{task}",
    f"--config.seed={seed}",
    f"--config.data.path={_WORK}/latents",
    f"--config.val.data.path={_WORK}/heldout_latents",
    f"--config.evaluators.semantic.autoencoder={_ASSETS}/dc_ae_v_tiny",
    *(f"--config.evaluators.semantic.{k}={v}/{k}" for k, v in parts.items()),
    *more,
    group=phase,
  )


def _exported(name: str) -> chain.Stage:
  name = f"distillation/{name}"
  return chain.Stage(
    f"{name}/lora",
    f"{name}/lora",
    "launch.export",
    (
      f"--workdir={{work}}/{name}",
      f"--output={{work}}/{name}/lora",
      *("--format=lora", "--dtype=bfloat16"),
    ),
    "lora",
  )


def _asked(
  task: str, name: str, *how: str, lora: str = ""
) -> Iterator[chain.Stage]:
  """Makes the stages that ask 400 prompts once, and 16 of them 25 times."""
  if lora:
    how += (f"--lora={_WORK}/{lora}/lora",)
  for kind, prompts in (("scores", ("400", "1")), ("spread", ("16", "25"))):
    output = f"distillation/{task}_{name}.{kind}"
    number, seeds = prompts
    yield chain.Stage(
      output,
      f"{output}.json",
      "launch.evaluate",
      (
        "--what=semantic",
        "--model=tiny",
        f"--task={task}",
        f"--prompts={number}",
        f"--seeds={seeds}",
        f"--output={{work}}/{output}.json",
        *how,
      ),
      kind,
    )


def write(work: pathlib.Path, seeds: Sequence[str]) -> str:
  """Writes distillation/table.md from the scores, and returns it.

  Args:
    work: folder of the chain, in which all stages are done.
    seeds: with which each model was distilled.
  """
  columns = [*_FACTS, *_SPREAD]
  lines = [
    f"| task | student | evaluations | {' | '.join(columns)} |",
    "|---|" + "---|" * (2 + len(columns)),
  ]
  for task, used, kinds in (
    ("t2v", seeds, tuple(KINDS)),
    ("i2v", seeds[:1], ("matching",)),
  ):
    rows = [("teacher", 32, ["teacher"])]
    rows += [("guidance", 16, [f"guidance_{seed}" for seed in used])]
    for kind in kinds:
      rows.append((kind, 4, [f"{kind}_{seed}" for seed in used]))
    for title, count, names in rows:
      cells = _cells(work / "distillation", [f"{task}_{x}" for x in names])
      lines.append(f"| {task} | {title} | {count} | {' | '.join(cells)} |")
  table = "\n".join(lines) + "\n"
  with files.atomic(work / "distillation" / "table.md") as path:
    path.write_text(table, encoding="utf-8")
  return table


def _cells(folder: pathlib.Path, names: Sequence[str]) -> Iterator[str]:
  """Yields the means over the seeds, with the range of several."""
  scores = [_read(folder / f"{name}.scores.json")["accuracy"] for name in names]
  spread = [_read(folder / f"{name}.spread.json")["spread"] for name in names]
  for facts, keys, factor, digits in (
    (scores, _FACTS, 100, 1),
    (spread, _SPREAD, 1, 4),
  ):
    for key in keys:
      values = [factor * x[key] for x in facts]
      cell = f"{np.mean(values):.{digits}f}"
      if len(values) > 1:
        cell += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
      yield cell


def _read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8"))
