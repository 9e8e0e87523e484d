"""Times this library beside PyTorch."""

from benchmarks import main
from dcvideogen_jax.programs import cli

if __name__ == "__main__":
  cli.run(main)
