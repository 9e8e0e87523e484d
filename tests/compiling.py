"""How XLA compiles what tests run once or twice: quickly."""

import importlib.metadata

# Loops of fused operations compile in half the time with the emitters that
# jaxlib 0.10 still has beside the newer ones.
_OLDER_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")

# For the environment variable XLA_FLAGS.
FLAGS = " ".join(
  [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    *["--xla_cpu_use_fusion_emitters=false"] * _OLDER_EMITTERS,
  ]
)

# For `jax.jit(compiler_options=)`: in the emitters that programs use, with
# which two programs for one function round alike more often.
AS_PROGRAMS = {"xla_cpu_use_fusion_emitters": True} if _OLDER_EMITTERS else {}
