"""Encodes and decodes a video or an image, and measures the reconstruction."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("reconstruct")
