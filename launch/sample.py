"""Makes videos from prompts, and from images."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("sample")
