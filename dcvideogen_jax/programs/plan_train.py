"""Estimates memory and time of a training step on devices you do not have.

  dcvideogen plan train --config=configs/adapt.py:wan_t2v_14b,phase=lora \\
    --target=v5p:4x4x4 --config.mesh.fsdp=32 --config.mesh.context=2

compiles the same step that `dcvideogen train` would run with this config, as
jax does on the device. Weights and clips are not read. Memory and the traffic
between devices are the compiler's figures. FLOPs are counted in the traced and
in the compiled program. Times follow from the peak rates of data sheets, so
they are lower bounds. Only autoencoders for TPUs are compiled with less effort
than on the device, where compiling takes long. --suggest ranks meshes,
rematerialisation policies and micro-batches by arithmetic, and compiles the
best three.

The exit code is 1 if the step does not fit. TPUs need requirements-tpu.txt and
GPUs requirements-cuda.txt, each best in an environment of its own, and
JAX_PLATFORMS=cpu. The workspaces of cuDNN, and the memory of autotuning in the
first run, are unknown without the device and are not counted.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import plan_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file and, after a colon, its argument, as for `dcvideogen train`."
  " --config.KEY=VALUE overrides a value.",
)
_SUGGEST = flags.DEFINE_bool(
  "suggest",
  False,
  "Rank other meshes, rematerialisation policies and micro-batches for the same"
  " step, and compile the best three, instead of the config's own.",
)

# How many of the ways that --suggest ranks are printed, and how many compiled.
_RANKED, _COMPILED = 10, 3


def main(argv: Sequence[str]) -> None:
  """Compiles the training step for the target and prints a table.

  Raises:
    errors.UserError: if --config is not that of a training.
  """
  del argv
  if _CONFIG.value is None:
    raise errors.UserError("--config: expected the config of a training")
  if "optim" not in _CONFIG.value:
    raise errors.UserError(
      "--config: expected the config of a training, found one of sampling, "
      "which `dcvideogen plan sample` plans"
    )
  config = _CONFIG.value.to_dict()
  plan_flags.run(
    lambda target: (_suggest if _SUGGEST.value else _train)(config, target)
  )


def _train(config: dict[str, Any], target: Any) -> tuple[dict[str, Any], bool]:
  """Prints the figures of a step; returns them and whether the step fits."""
  from dcvideogen_jax.plan import compiled, tables, training

  print(
    f"{config['task']} on {target.name}; compiling, which can take minutes",
    flush=True,
  )
  try:
    figures = training.measure(config, target)
  except compiled.TooLarge as e:
    print(f"does not fit: {e}", flush=True)
    return {"target": target.name, "too_large": str(e)}, False
  print(tables.training(figures), flush=True)
  return figures, tables.fits(figures)


def _suggest(
  config: dict[str, Any], target: Any
) -> tuple[dict[str, Any], bool]:
  """Prints the best ways to run a step; returns them and whether one fits."""
  from dcvideogen_jax.plan import suggest, tables

  ways = suggest.rank(config, target)
  print(tables.ways(ways[:_RANKED]), flush=True)
  plans, ways = [], ways[:_COMPILED]
  for i, way in enumerate(ways):
    print(f"\n{i + 1} of {len(ways)}: {tables.way(way)}", flush=True)
    figures, fits = _train(way.change(config), target)
    plans.append({"way": way._asdict(), **figures, "fits": fits})
  fitting = [plan for plan in plans if plan["fits"]]
  if not fitting:
    print("\nnone of these fits")
    return {"plans": plans, "best": None}, False
  best = min(fitting, key=lambda plan: plan["seconds"]["total"])["way"]
  print(f"\nbest: {tables.way(suggest.Way(**best))}")
  return {"plans": plans, "best": best}, True
