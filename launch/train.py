"""Trains what a config describes, and continues where it stopped."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("train")
