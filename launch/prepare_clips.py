"""Makes the training or evaluation clips of the tiny autoencoder."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("prepare_clips")
