"""Encodes captioned videos once, for training on their latents."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("precompute")
