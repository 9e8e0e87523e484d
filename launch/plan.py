"""Starts one of the programs `dcvideogen plan ...`, which the flags choose."""

import runpy
import sys

from dcvideogen_jax.programs import cli


def _program() -> str:
  """Returns the program: by --attention, by the kind of --config, or decode."""
  if tokens := cli.take("attention"):
    sys.argv.append(f"--tokens={tokens}")
    return "plan attention"
  if (config := cli.given("config")) is None:
    return "plan decode"
  path, _, argument = config.partition(":")
  if not path.endswith(".py"):  # The config is a preset of sampling.
    return "plan sample"
  try:
    get_config = runpy.run_path(path)["get_config"]
    trains = "optim" in (get_config(argument) if argument else get_config())
  except Exception:  # The program reports the error when it reads the config.
    trains = True
  return "plan train" if trains else "plan sample"


if __name__ == "__main__":
  cli.start(_program())
