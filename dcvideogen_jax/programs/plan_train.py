"""Says what a training step takes on devices that are not there.

  dcvideogen plan train --config=configs/adapt.py:wan_t2v_14b,phase=lora \\
    --target=v5p:4x4x4 --config.mesh.fsdp=32 --config.mesh.context=2

compiles the very step that `dcvideogen train` would run with this config, as
jax does on the device. Weights and clips are not read. Memory and what devices
send each other is the compiler's, FLOPs are counted in the traced and in the
compiled program, and times are those of data sheets: nothing can be faster.
Only autoencoders for TPUs are compiled with less effort than on the device,
where that takes long. --suggest ranks meshes, rematerialisation and
micro-batches by arithmetic, and compiles the best three.

Exits with 1 if the step does not fit. TPUs need requirements-tpu.txt and GPUs
requirements-cuda.txt, each best in an environment of its own, and
JAX_PLATFORMS=cpu. Workspaces of cuDNN, and what autotuning holds at the first
run, are not known without the device and not counted.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import plan_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config of `dcvideogen train`."
)
_SUGGEST = flags.DEFINE_bool(
  "suggest", False, "Compile the best of other ways to run the step."
)

# Of the ways that --suggest ranks, how many are printed and how many compiled.
_RANKED, _COMPILED = 10, 3


def main(argv: Sequence[str]) -> None:
  """Plans, compiles and prints."""
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
  """Prints what a step takes; returns it and whether it fits."""
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
