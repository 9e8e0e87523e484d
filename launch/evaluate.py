"""Measures a model on what no training has seen."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("evaluate")
