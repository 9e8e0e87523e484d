"""Says what sampling takes on devices that are not there.

  dcvideogen plan sample --config=dc-t2v-14b,size=2160p --target=h100

compiles every program of `dcvideogen sample` with this config, all models
resident: the weights of each, every program, and their sum beside what jax has
of the device. Weights are not read. FLOPs are counted in the traced and in the
compiled program, and times are those of data sheets: nothing can be faster.

Exits with 1 if it does not fit. TPUs need requirements-tpu.txt and GPUs
requirements-cuda.txt, each best in an environment of its own, and
JAX_PLATFORMS=cpu. Workspaces of cuDNN, and what autotuning holds at the first
run, are not known without the device and not counted.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import config_flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import plan_flags
from dcvideogen_jax.sample import presets

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A preset or a config file, as for `dcvideogen sample`.",
)

PRESETS = presets


def main(argv: Sequence[str]) -> None:
  """Plans, compiles and prints."""
  del argv
  if _CONFIG.value is None or "optim" in _CONFIG.value:
    raise errors.UserError("--config: expected the config of a sampling")
  plan_flags.run(_sample)


def _sample(target: Any) -> tuple[dict[str, Any], bool]:
  """Prints weights, programs and their sum; returns them and if it fits."""
  from dcvideogen_jax.plan import compiled, sampling, tables

  config = _CONFIG.value
  size = sampling.size(config)
  print(
    f"{config.variant} sampling {size.frames} frames of "
    f"{size.height}x{size.width} on {target.name}, "
    f"{config.dtype or 'bfloat16'}",
    flush=True,
  )
  try:
    figures = sampling.measure_config(
      config, target, lambda phase: print(f"compiling {phase}", flush=True)
    )
  except compiled.TooLarge as e:
    print(f"does not fit: {e}")
    return {"too_large": str(e)}, False
  print(tables.sampling(figures, config.steps))
  return figures, figures["peak"] <= figures["limit"]
