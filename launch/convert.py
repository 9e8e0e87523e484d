"""Converts weights between libraries' layouts and this project's."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("convert")
