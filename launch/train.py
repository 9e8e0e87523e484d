"""Trains the model of a config, and continues an interrupted training."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("train")
