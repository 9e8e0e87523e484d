"""Random weights and clips that are the same in every process."""

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Makes a random float32 tensor of an official state dict.

  The name seeds the values. Convolution and linear weights preserve the
  variance of their input, norms scale by about 1, and biases are small.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  x = rng.standard_normal(shape, np.float32)
  if len(shape) > 1:
    x *= math.prod(shape[1:]) ** -0.5
    return x
  x *= 0.1
  if name.endswith(".weight"):
    x += 1
  return x


def clip(shape: tuple[int, ...]) -> np.ndarray:
  """Makes a float32 video in [-1, 1]: smooth along every axis, plus noise."""
  rng = np.random.default_rng(0)
  axes = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
  waves = (np.sin(2 * np.pi * (3 + i) * axis) for i, axis in enumerate(axes))
  video = sum(waves) / len(axes) + 0.1 * rng.standard_normal(shape)
  return np.clip(video, -1, 1).astype(np.float32)


def normal(*shapes: Sequence[int]) -> list[np.ndarray]:
  """Makes standard normal float32 arrays."""
  return [
    np.random.default_rng(seed).standard_normal(shape, np.float32)
    for seed, shape in enumerate(shapes)
  ]


def torch_shapes(kind: str, layout: str, module: Any) -> dict[str, list[int]]:
  """Returns the shape of every weight by its name in a layout of PyTorch."""
  from dcvideogen_jax.convert import api, matching, naming

  rules = api.KINDS[kind].layouts[layout]
  shapes = naming.torch_shapes(rules, matching.parameters(kind, module))
  return {name: [*shape] for name, shape in shapes.items()}


def torch_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Makes the weights as float32 tensors of torch."""
  import torch

  return {
    name: torch.from_numpy(weight(name, tuple(shape)))
    for name, shape in shapes.items()
  }


def torch_flops(call: Callable[[], Any]) -> int:
  """Runs a call, and returns the FLOPs that torch counts in it."""
  from torch.nn import attention
  from torch.utils import flop_counter

  # torch counts no attention in the kernel that it uses on a CPU.
  with attention.sdpa_kernel(attention.SDPBackend.MATH):
    with flop_counter.FlopCounterMode(display=False) as counter:
      call()
  return counter.get_total_flops()


def params(
  kind: str, layout: str, module: Any, shapes: Mapping[str, Sequence[int]]
) -> Any:
  """Makes the same weights as the parameters of a module."""
  from dcvideogen_jax.convert import api, engine, matching, sources

  tensors = {
    name: sources.Tensor(
      tuple(shape),
      np.dtype(np.float32),
      lambda name=name, shape=shape: weight(name, tuple(shape)),
    )
    for name, shape in shapes.items()
  }
  return engine.torch_to_jax(
    api.KINDS[kind].layouts[layout],
    tensors,
    matching.parameters(kind, module),
    "random weights",
  )


def compiled(
  function: Any, *arguments: Any
) -> tuple[Any, float, Callable[[], int]]:
  """Compiles a jitted function.

  Returns:
    the program, the seconds it took, and what counts the FLOPs of a run.
  """
  from dcvideogen_jax import flops

  start = time.perf_counter()
  traced = function.trace(*arguments)
  program = traced.lower().compile()
  seconds = time.perf_counter() - start
  return program, seconds, lambda: flops.count(traced.jaxpr.jaxpr)
