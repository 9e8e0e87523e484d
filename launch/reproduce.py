"""Trains all tiny models that ship, from random weights to a video model."""

from benchmarks import reproduce
from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.run(reproduce)
