"""Estimates memory and time of sampling on devices you do not have.

  dcvideogen plan sample --config=dc-t2v-14b,size=2160p --target=h100

compiles every program of `dcvideogen sample` with this config, ahead of time.
All models are resident, unless --text_encoder says otherwise. It prints the
weights of each model, the memory of each program, and their peak beside the
device memory that jax may use. Weights are not read. FLOPs are counted in the
traced and in the compiled program. Times follow from the peak rates of data
sheets, so they are lower bounds.

The exit code is 1 if sampling does not fit. TPUs need requirements-tpu.txt and
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
from dcvideogen_jax.sample import presets

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config to plan for: a preset or a config file, as for `dcvideogen sample`."
  " Unset: tiny. --config.KEY=VALUE overrides a value.",
)
_DECODER = flags.DEFINE_enum(
  "decoder", None, [plan_flags.FAST], plan_flags.DECODER_HELP
)
_TEXT_ENCODER = flags.DEFINE_enum(
  "text_encoder",
  "device",
  ["device", "once", "host"],
  "Where the text encoder is, as for `dcvideogen sample`.",
)
_BUDGET = flags.DEFINE_float(
  "memory_budget_gib",
  None,
  "Memory for encoding and decoding with DC-AE-V, beyond the weights, in GiB,"
  " as for `dcvideogen sample`. Unset: what the weights leave.",
  lower_bound=1e-6,
)

PRESETS = presets


def main(argv: Sequence[str]) -> None:
  """Compiles the programs of sampling for the target and prints a table.

  Raises:
    errors.UserError: if --config is that of a training.
  """
  del argv
  if "optim" in _CONFIG.value:
    raise errors.UserError("--config: expected the config of a sampling")
  plan_flags.run(_sample)


def _sample(target: Any) -> tuple[dict[str, Any], bool]:
  """Prints weights, programs and peak; returns them and whether they fit."""
  from dcvideogen_jax.plan import compiled, sampling, tables

  config = _CONFIG.value
  size = sampling.size(config)
  print(
    f"{config.variant} sampling {size.frames} frames of "
    f"{size.height}x{size.width} on {target.name}, "
    f"{config.dtype or 'bfloat16'}"
    f"{f', weights in {config.weights}' if config.weights else ''}",
    flush=True,
  )
  try:
    figures = sampling.measure_config(
      config,
      target,
      lambda phase: print(f"compiling {phase}", flush=True),
      _TEXT_ENCODER.value,
      _BUDGET.value and _BUDGET.value * 2**30,
      _DECODER.value == plan_flags.FAST,
    )
  except compiled.TooLarge as e:
    print(f"does not fit: {e}")
    return {"too_large": str(e)}, False
  print(tables.sampling(figures, config.steps))
  return figures, figures["peak"] <= figures["limit"]
