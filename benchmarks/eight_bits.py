"""Errors of kernels in eight bits, in a block of Wan 1.3B at its real widths.

  python3 -m benchmarks.eight_bits

prints, for int8 and float8, the relative error of every linear map of the block
and of the block's output against float32, on random tokens and the kernels of
an initialisation. "output" and "input" plant one channel in a hundred whose
weights are 20 times larger, among the output or the input channels of every
kernel. The error is the root mean square of the difference over that of the
exact result.
"""

import functools
from collections.abc import Iterator

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import tree
from dcvideogen_jax.models import eight_bits, rope, wan_blocks

WIDTH, HEADS, FFN, TOKENS, TEXT = 1536, 12, 8960, 256, 64
PLANTED = ("none", "output", "input")


def measure(
  width: int = WIDTH, heads: int = HEADS, ffn: int = FFN
) -> Iterator[tuple[str, str, dict[str, float], float]]:
  """Yields the errors for each kind of planted channels and each format.

  Args:
    width, heads, ffn: of the block.

  Yields:
    One of `PLANTED`, the format, the errors of the linear maps by name, and
    that of what the block adds to its input.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (1, TOKENS, width))
  time = 0.1 * jax.random.normal(keys[1], (1, 1, 6, width))
  text = jax.random.normal(keys[2], (1, TEXT, width))
  angles = rope.angles(tuple(map(np.arange, (1, 16, 16))), width // heads)
  inputs = (x, time, text, None, angles)
  block = functools.partial(
    wan_blocks.Block, heads, ffn, 1e-6, None, None, lora={}
  )
  dense = {"dtype": jnp.float32, "param_dtype": jnp.float32}
  exact = block(dense=dense)
  first = tree.flatten(jax.jit(exact.init)(keys[3], *inputs))
  for where in PLANTED:
    leaves = {name: _planted(name, x, where) for name, x in first.items()}
    expected = jax.jit(exact.apply)(_nested(leaves), *inputs)[0] - x
    for name in eight_bits.FORMATS:
      rounded, errors = dict(leaves), {}
      for path in [n for n in leaves if n.endswith("/kernel")]:
        kernel = np.asarray(leaves[path])
        stored, scale = eight_bits.quantise(kernel, name)
        rounded[path] = jnp.asarray(stored)
        rounded[path.removesuffix("kernel") + "scale"] = jnp.asarray(scale)
        rows = np.asarray(jax.random.normal(keys[0], (64, len(kernel))))
        again = stored.astype(np.float32) * scale
        errors[path] = _error(rows @ again, rows @ kernel)
      module = block(dense={**dense, "weights": name})
      found = jax.jit(module.apply)(_nested(rounded), *inputs)[0] - x
      yield where, name, errors, _error(found, expected)


def _planted(name: str, leaf: jax.Array, where: str) -> jax.Array:
  """Makes one channel in a hundred of a kernel 20 times larger."""
  if where == "none" or not name.endswith("/kernel"):
    return leaf
  axis = -1 if where == "output" else -2
  size = leaf.shape[axis]
  large = np.random.default_rng(len(name)).choice(size, size // 100, False)
  factor = np.ones(size, np.float32)
  factor[large] = 20
  return leaf * (factor[None] if axis == -1 else factor[:, None])


def _error(found, expected) -> float:
  exact = np.asarray(expected, np.float64)
  difference = np.asarray(found, np.float64) - exact
  return float(np.sqrt(np.mean(difference**2) / np.mean(exact**2)))


def _nested(leaves):
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def main() -> None:
  """Prints the table."""
  print("planted  format   linear maps: least, largest  block")
  for where, name, errors, block in measure():
    print(
      f"{where:8} {name:8} {min(errors.values()):12.5f}"
      f" {max(errors.values()):12.5f} {block:12.5f}",
      flush=True,
    )


if __name__ == "__main__":
  main()
