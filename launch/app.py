"""Starts `dcvideogen app`."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("app")
