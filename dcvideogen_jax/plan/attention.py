"""Compiles attention, dense and masked, for devices that are not present."""

import functools
import pathlib
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import flops, sharding
from dcvideogen_jax.ops import attention
from dcvideogen_jax.plan import compiled, hardware, hlo

HEADS, WIDTH = 40, 128  # Heads and head width of Wan 14B.

# Implementations to compile by platform, in the order of the table. "cudnn" has
# no masks, and "by_chunks" without a mask calls "cudnn".
_DENSE = {"gpu": ("cudnn", "pallas", "chunked"), "tpu": ("splash", "chunked")}
_MASKED = {
  "gpu": ("by_chunks", "pallas", "chunked"),
  "tpu": ("splash", "chunked"),
}


def cases(
  target: hardware.Target, tokens: int, blocks: int
) -> Iterator[dict[str, Any]]:
  """Yields arguments of `measure` for each row of a table.

  The rows are each implementation, dense and block-causal, forward alone and
  with the backward pass.

  Args:
    target: a GPU or TPUs.
    tokens: number of tokens per sample.
    blocks: number of blocks of the block-causal mask; the last may be smaller.
  """
  platform = "gpu" if isinstance(target.chip, hardware.Gpu) else "tpu"
  mask = attention.BlockCausal(-(-tokens // blocks))
  for backward in (False, True):
    for found, names in ((None, _DENSE), (mask, _MASKED)):
      for name in names[platform]:
        yield {
          "tokens": tokens,
          "mask": found,
          "implementation": name,
          "backward": backward,
        }


def measure(
  target: hardware.Target,
  tokens: int,
  mask: attention.Mask | None,
  implementation: str,
  backward: bool,
  dtype: str = "bfloat16",
  heads: int = HEADS,
  width: int = WIDTH,
) -> dict[str, Any]:
  """Compiles attention of one sample on one device.

  Args:
    target: the device to compile for.
    tokens: number of queries, and of keys.
    mask: None is dense attention.
    implementation: a name of `ops.attention`.
    backward: whether to compile the gradients of queries, keys and values
      together with the forward pass.
    dtype: dtype of all inputs.
    heads: number of heads.
    width: channels of a head.

  Returns:
    "flops"; "traffic", a lower bound of the bytes of memory that are moved, as
    repeated reads within a kernel are not counted; "temporaries", bytes; and
    "kernels", the `resources` of Pallas kernels on a GPU by their names.

  Raises:
    compiled.TooLarge: if the program does not fit into the device's memory.
    compiled.Refused: if jax or the compiler cannot compile the program.
    attention.Unsupported: if the implementation does not support these
      arguments.
  """
  mesh = sharding.make_mesh({"data": 1}, target.devices[:1])
  shape = jax.ShapeDtypeStruct((1, tokens, heads, width), jnp.dtype(dtype))
  shapes = compiled.place(mesh, (shape,) * 3)
  attend = functools.partial(
    attention.attention, mask=mask, implementation=implementation
  )

  def gradients(q, k, v, dout):
    return jax.vjp(attend, q, k, v)[1](dout)

  if backward:
    shapes = *shapes, shapes[0]
  with (
    compiled.refusals(),
    jax.set_mesh(mesh),
    tempfile.TemporaryDirectory() as folder,
  ):
    traced = jax.jit(gradients if backward else attend).trace(*shapes)
    program = compiled.compile_traced(traced, _dump(target, folder))
    kernels = resources(pathlib.Path(folder), target)
  return {
    "flops": flops.count(traced.jaxpr.jaxpr),
    "traffic": hlo.Program(program.as_text()).traffic(),
    "temporaries": program.memory_analysis().temp_size_in_bytes,
    "kernels": kernels,
  }


def try_to_measure(
  target: hardware.Target, case: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns `measure`, or the reason it failed: "too_large" or "refused"."""
  try:
    return measure(target, **case)
  except compiled.TooLarge as e:
    return {"too_large": str(e)}
  except (compiled.Refused, attention.Unsupported) as e:
    return {"refused": str(e)}


def _dump(target: hardware.Target, folder: str) -> dict[str, Any]:
  if not isinstance(target.chip, hardware.Gpu):
    return {}
  return {"xla_dump_to": folder}


def resources(
  folder: pathlib.Path, target: hardware.Target
) -> dict[str, Mapping[str, int]]:
  """Reads the GPU resources of attention kernels from a dump of XLA.

  Args:
    folder: the directory of --xla_dump_to. Without kernels the result is empty.
    target: the GPU.

  Returns:
    By the kernel's name: "shared", bytes of shared memory per thread block;
    "threads" per block; and, if ptxas is found, "registers" per thread and
    "spilled", bytes of registers that are spilled.
  """
  found: dict[str, dict[str, int]] = {}
  for path in folder.glob("*.thunk_sequence.txt"):
    for name, threads, shared in _LAUNCH.findall(path.read_text()):
      found[name] = {"shared": int(shared), "threads": int(threads)}
  assembler = _assembler()
  if not found or assembler is None:
    return found
  assert isinstance(target.chip, hardware.Gpu)
  for path in folder.glob("*.ptx"):
    text = subprocess.run(
      [
        assembler,
        "-v",
        f"-arch={target.chip.architecture}",
        path,
        "-o",
        "/dev/null",
      ],
      capture_output=True,
      text=True,
      check=True,
    ).stderr
    for name, stores, registers in _ASSEMBLED.findall(text):
      if name in found:
        found[name] |= {"registers": int(registers), "spilled": int(stores)}
  return found


_LAUNCH = re.compile(
  r"(attention_\w+) grid: .*?threads: \[(\d+),.*?shared_memory: (\d+) bytes"
)
_ASSEMBLED = re.compile(
  r"Function properties for (\w+)\n.*?(\d+) bytes spill stores.*\n"
  r".*?Used (\d+) registers"
)


def _assembler() -> str | None:
  """Returns the path of ptxas, from jax's CUDA packages or $PATH, or None."""
  packages = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia"
  for path in sorted(packages.glob("*/bin/ptxas")):
    return str(path)
  return shutil.which("ptxas")
