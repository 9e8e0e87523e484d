"""Encodes and decodes a video or an image, and says how well that went."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("reconstruct")
