"""Trains the family of tiny models that ships, from nothing to a video."""

from benchmarks import reproduce
from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.run(reproduce)
