"""Writes the result of a training under the names of PyTorch."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("export")
