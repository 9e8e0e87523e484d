"""`dcvideogen plan ...`; the flags choose which."""

import runpy
import sys

from dcvideogen_jax.programs import cli


def _program() -> str:
  """Attention with --attention, what a config is for, or else decoding."""
  if tokens := cli.take("attention"):
    sys.argv.append(f"--tokens={tokens}")
    return "plan attention"
  if (config := cli.given("config")) is None:
    return "plan decode"
  path, _, argument = config.partition(":")
  if not path.endswith(".py"):  # A preset.
    return "plan sample"
  try:
    get_config = runpy.run_path(path)["get_config"]
    trains = "optim" in (get_config(argument) if argument else get_config())
  except Exception:  # The program says what is wrong.
    trains = True
  return "plan train" if trains else "plan sample"


if __name__ == "__main__":
  cli.start(_program())
