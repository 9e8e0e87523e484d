"""Says how much memory and time something takes on devices that are not there.

Compiles the very program that would run, as jax does on the device; memory and
what devices send each other is the compiler's, FLOPs are counted in the traced
and in the compiled program, and times are those of data sheets: nothing can be
faster. Only autoencoders for TPUs are compiled with less effort than on the
device, where that takes long. Exits with 1 if something does not fit, and with
2 and one sentence if jax or the compiler refuses it; --verbosity=1 shows where.

  python -m launch.plan --config=configs/adapt.py:wan_t2v_14b,phase=lora \\
    --target=v5p:4x4x4 --config.mesh.fsdp=32 --config.mesh.context=2

plans a step of training, of any config of `launch.train`. Weights and clips are
not read. --suggest ranks meshes, what is computed again and micro-batches by
arithmetic, and compiles the best three.

  python -m launch.plan --config=configs/sample.py:dc-t2v-14b,size=2160p \\
    --target=h100

plans sampling with all models resident: the weights of each, every program, and
their sum beside what jax has of the device under `launch.sample`.

  python -m launch.plan --model=f32t4c32 --target=h100 --height=2176 \\
    --width=3840 --budget_gib=8,16,24

decodes one 40-frame chunk in the middle of a long video: a row per budget, in
memory of each device beyond the weights. The devices share the columns.

  python -m launch.plan --attention=17600,40800,163200 --blocks=2 --target=h100

compiles attention of so many tokens, 40 heads of 128 in bfloat16, dense and
block-causal, forward and backward, in every implementation for the target; of
kernels of ours also the registers and the shared memory.

TPUs need requirements-tpu.txt and GPUs requirements-cuda.txt, each best in an
environment of its own, and JAX_PLATFORMS=cpu. Workspaces of cuDNN's
convolutions and attention, and what autotuning holds at the first run, are not
known without the device and not counted.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from dcvideogen_jax import errors, files, sharding
from dcvideogen_jax.models import bands, dc_ae_v
from dcvideogen_jax.ops import attention as ops_attention
from dcvideogen_jax.plan import (
  attention,
  compiled,
  decode,
  hardware,
  sampling,
  suggest,
  tables,
  training,
)

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config of launch.train or launch.sample."
)
_MODEL = flags.DEFINE_enum(
  "model",
  "f32t4c32",
  [*dc_ae_v.VARIANTS],
  "Without --config: an autoencoder, to decode.",
)
_TARGET = flags.DEFINE_string(
  "target", "h100", "A GPU, such as h100, or a TPU slice, such as v5p:4x4x4."
)
_SUGGEST = flags.DEFINE_bool(
  "suggest", False, "Training: compile the best of other ways to run it."
)
_HEIGHT = flags.DEFINE_integer("height", 704, "Decoding: rows.", lower_bound=1)
_WIDTH = flags.DEFINE_integer(
  "width", 1280, "Decoding: columns.", lower_bound=1
)
_BUDGETS = flags.DEFINE_list(
  "budget_gib", ["8", "16", "24"], "Decoding: memory beyond the weights."
)
_WHOLE = flags.DEFINE_bool(
  "whole", True, "Decoding: compile the whole frame too, for comparison."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "bfloat16",
  ["bfloat16", "float32"],
  "Decoding: of weights and computation.",
)
_ATTENTION = flags.DEFINE_list(
  "attention", None, "Compile attention alone: numbers of tokens."
)
_BLOCKS = flags.DEFINE_integer(
  "blocks", 2, "Attention: of the block-causal mask.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")

Number = TypeVar("Number", int, float)

_GIB = 2**30
# Of the ways that --suggest ranks, how many are printed and how many compiled.
_RANKED, _COMPILED = 10, 3
_DECODING = ("model", "height", "width", "budget_gib", "whole", "dtype")
# Flags that say nothing about what another one asks for.
_IGNORED = {
  "attention": ("config", "suggest", *_DECODING),
  "config": ("blocks", *_DECODING),
  "model": ("suggest", "blocks"),
}


def main(argv: Sequence[str]) -> None:
  """Plans, compiles and prints."""
  del argv
  config = _CONFIG.value
  what = "model" if config is None else "config"
  what = "attention" if _ATTENTION.value else what
  for name in _IGNORED[what]:
    if flags.FLAGS[name].present:
      raise errors.UserError(f"--{name} says nothing about --{what}")
  target = hardware.find(_TARGET.value)
  with compiled.refusals():
    figures, fits = _plan(what, config, target)
  if _JSON.value:
    with files.atomic(_JSON.value) as path:
      path.write_text(json.dumps(figures, indent=2) + "\n")
  sys.exit(0 if fits else 1)


def _plan(what: str, config: Any, target: hardware.Target) -> tuple[Any, bool]:
  """Figures, and whether all that was planned fits."""
  if what == "attention":
    return _attention(target)
  if what == "model":
    return _decode(target)
  if "optim" not in config:
    return _sample(config, target)
  if _SUGGEST.value:
    return _suggest(config.to_dict(), target)
  return _train(config.to_dict(), target)


def _train(
  config: dict[str, Any], target: hardware.Target
) -> tuple[dict[str, Any], bool]:
  """Prints what a step takes; returns it and whether it fits."""
  print(
    f"{config['task']} on {target.name}; compiling, which can take minutes",
    flush=True,
  )
  try:
    found = training.measure(config, target)
  except compiled.TooLarge as e:
    print(f"does not fit: {e}", flush=True)
    return {"target": target.name, "too_large": str(e)}, False
  print(tables.training(found), flush=True)
  return found, tables.fits(found)


def _suggest(
  config: dict[str, Any], target: hardware.Target
) -> tuple[dict[str, Any], bool]:
  """Prints the best ways to run a step; returns them and whether one fits."""
  ways = suggest.rank(config, target)
  print(
    "by arithmetic                                             GiB  ms a step"
  )
  for way in ways[:_RANKED]:
    print(
      f"{_named(way):52} {way.bytes / _GIB:8.1f} {1e3 * way.seconds:10.1f}",
      flush=True,
    )
  plans = []
  for i, way in enumerate(ways[:_COMPILED]):
    count = min(_COMPILED, len(ways))
    print(f"\n{i + 1} of {count}: {_named(way)}", flush=True)
    found, fits = _train(way.change(config), target)
    plans.append({"way": way._asdict(), **found, "fits": fits})
  fitting = [plan for plan in plans if plan["fits"]]
  if not fitting:
    print("\nnone of these fits")
    return {"plans": plans, "best": None}, False
  best = min(fitting, key=lambda plan: plan["seconds"]["total"])
  print(f"\nbest: {_named(suggest.Way(**best['way']))}")
  return {"plans": plans, "best": best["way"]}, True


def _named(way: suggest.Way) -> str:
  again = f"remat {way.remat}" if way.remat else "no remat"
  return f"{tables.mesh(way.mesh)}; {again}; accumulate {way.accumulate}"


def _attention(
  target: hardware.Target,
) -> tuple[list[dict[str, Any]], bool]:
  """Prints a row per program; returns all and whether they fit."""
  sizes = _numbers("attention", int)
  rows = []
  print(tables.ATTENTION)
  for tokens in sizes:
    for case in attention.cases(target, tokens, _BLOCKS.value):
      try:
        found = attention.measure(target, **case)
      except compiled.TooLarge as e:
        found = {"too_large": str(e)}
      except (compiled.Refused, ops_attention.Unsupported) as e:
        found = {"refused": str(e)}
      print(tables.attention(case, found), flush=True)
      mask = case["mask"]
      block = mask.block if mask else None
      rows.append({**case, "mask": block, **found})
  return rows, not any({"too_large", "refused"} & {*row} for row in rows)


def _numbers(flag: str, kind: type[Number]) -> list[Number]:
  """The positive numbers of a flag that is a list."""
  given = flags.FLAGS[flag].value
  try:
    numbers = [kind(text) for text in given]
  except ValueError:
    numbers = []
  if not numbers or not all(0 < n < math.inf for n in numbers):
    raise errors.UserError(
      f"--{flag}: expected positive numbers, found {','.join(given)!r}"
    )
  return numbers


def _decode(
  target: hardware.Target,
) -> tuple[list[dict[str, Any]], bool]:
  """Prints a row per budget; returns figures and whether all are kept."""
  dtype = jnp.dtype(_DTYPE.value)
  module, variables = compiled.part(
    "dc_ae_v", _MODEL.value, dtype=dtype, param_dtype=dtype
  )
  size = (_HEIGHT.value, _WIDTH.value)
  mesh = sharding.make_mesh({"spatial": -1}, target.devices)
  devices = sharding.num_shards(mesh, "columns")
  budgets = dict(
    zip(_BUDGETS.value, _numbers("budget_gib", float), strict=True)
  )
  plans = {
    f"{text} GiB": bands.plan(
      module,
      *size,
      budget * _GIB,
      decode=True,
      devices=devices,
      platform=target.devices[0].platform,
    )
    for text, budget in budgets.items()
  }
  if _WHOLE.value:
    plans["whole"] = bands.BandPlan()
  plain = bands.work(module, *size, decode=True)
  print(
    f"{_MODEL.value} decoding 40 frames of {size[0]}x{size[1]} on "
    f"{target.name}, {_DTYPE.value}\n"
    "budget    cut rows state   runs  peak GiB  planned  temporaries  "
    "work  TFLOP"
  )
  rows, over = [], False
  for name, plan in plans.items():
    try:
      found = decode.measure(module, variables, *size, plan, mesh)
    except compiled.TooLarge as e:
      over |= name != "whole"
      print(f"{name:9} does not fit: {e}", flush=True)
      rows.append({"budget": name, "plan": vars(plan), "too_large": str(e)})
      continue
    main_program = [*found["programs"].values()][-1]
    state = "host" if plan.offload else "device"
    over |= name != "whole" and found["bytes"] > float(name.split()[0]) * _GIB
    print(
      f"{name:9} {plan.cut or '-':>3} {plan.rows or '-':>4} {state:7}"
      f"{main_program['runs']:5}  {found['bytes'] / _GIB:8.2f} "
      f"{plan.bytes / _GIB:8.2f}  "
      f"{main_program['temporaries'] / _GIB:11.2f}  "
      f"{found['flops'] / plain:4.2f} {found['flops'] / 1e12:6.0f}",
      flush=True,
    )
    rows.append({"budget": name, "plan": vars(plan), **found})
  return rows, not over


def _sample(
  config: Any, target: hardware.Target
) -> tuple[dict[str, Any], bool]:
  """Prints weights, programs and their sum; returns them and if it fits."""
  if _SUGGEST.value:
    raise errors.UserError("--suggest is for configs of launch.train")
  size = sampling.size(config)
  print(
    f"{config.variant} sampling {size.frames} frames of "
    f"{size.height}x{size.width} on {target.name}, "
    f"{config.dtype or 'bfloat16'}",
    flush=True,
  )
  try:
    found = sampling.measure_config(
      config, target, lambda phase: print(f"compiling {phase}", flush=True)
    )
  except compiled.TooLarge as e:
    print(f"does not fit: {e}")
    return {"too_large": str(e)}, False
  print(tables.sampling(found, config.steps))
  return found, found["peak"] <= found["limit"]
