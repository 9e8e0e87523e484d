"""Starts `dcvideogen sample`, or `dcvideogen stream` if --stream is given."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  streams = cli.take("stream") not in (None, "false", "0")
  cli.start("stream" if streams else "sample")
