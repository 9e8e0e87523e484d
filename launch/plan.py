"""Says what something needs on devices that are not there."""

from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.start("plan")
