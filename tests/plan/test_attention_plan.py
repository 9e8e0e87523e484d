"""Figures of attention alone, and kernels' resources from compilers' output."""

import functools

import jax
import pytest

from dcvideogen_jax.ops import attention as ops
from dcvideogen_jax.ops.attention import BlockCausal
from dcvideogen_jax.plan import attention, hardware, hlo, tpus

SIZE = {"heads": 2, "width": 16, "dtype": "float32"}


def _target(chip=hardware.GPUS["h100"]):
  return hardware.Target("here", chip, tuple(jax.devices()[:1]))


@pytest.mark.parametrize(
  ("chip", "masked"),
  [
    (hardware.GPUS["h100"], ["by_chunks", "pallas", "chunked"]),
    (tpus.TPUS["v5p"], ["splash", "chunked"]),
  ],
)
def test_cases(chip, masked):
  cases = [*attention.cases(_target(chip), 50, 3)]
  assert {case["tokens"] for case in cases} == {50}
  assert {case["mask"] for case in cases} == {None, BlockCausal(17)}
  for backward in (False, True):
    assert masked == [
      case["implementation"]
      for case in cases
      if case["mask"] and case["backward"] == backward
    ]


def test_figures():
  """A mask of two blocks saves a quarter of the work."""

  def measure(mask, backward=False):
    return attention.measure(
      _target(tpus.TPUS["v5p"]), 256, mask, "chunked", backward, **SIZE
    )

  dense, masked, both = (
    measure(None),
    measure(BlockCausal(128)),
    measure(BlockCausal(128), True),
  )
  assert dense["flops"] == 2 * 2 * 256**2 * 2 * 16
  assert masked["flops"] * 4 == dense["flops"] * 3
  # Eight products instead of two: the backward pass repeats two and adds four.
  assert both["flops"] == masked["flops"] * 4
  assert dense["kernels"] == {}
  x = jax.ShapeDtypeStruct((1, 256, 2, 16), "float32")

  def attend(q, k, v, mask=None):
    return ops.attention(q, k, v, mask=mask, implementation="chunked")

  def gradients(q, k, v, dout):
    return jax.vjp(functools.partial(attend, mask=BlockCausal(128)), q, k, v)[
      1
    ](dout)

  for found, function, inputs in (
    (dense, attend, 3),
    (masked, functools.partial(attend, mask=BlockCausal(128)), 3),
    (both, gradients, 4),
  ):
    program = jax.jit(function).lower(*[x] * inputs).compile()
    memory = program.memory_analysis()
    assert found["temporaries"] == memory.temp_size_in_bytes > 0
    assert found["traffic"] == hlo.Program(program.as_text()).traffic()
  # The dense program reads and writes each array at least once.
  assert dense["traffic"] > 4 * 256 * 2 * 16 * 4
  assert both["temporaries"] > masked["temporaries"]


# As jax 0.10.2 and CUDA 12.8 print them.
LAUNCHES = """\
001: kCustomKernel [source       | next=002 (1)] attention_forward grid: [138, \
1, 40] threads: [256, 1, 1]  shared_memory: 98304 bytes
002: kCustomKernel [prev=001 (1) | next=004 (2)] input_reduce_fusion grid: \
[88000, 1, 1] threads: [256, 1, 1]  shared_memory: 0 bytes
"""
ASSEMBLED = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attention_forward' for 'sm_90a'
ptxas info    : Function properties for attention_forward
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 183 registers, used 1 barriers, 16 bytes cumulative stack
ptxas info    : Compile time = 240.231 ms
"""


def test_resources_of_kernels(tmp_path, monkeypatch):
  folder = tmp_path / "dump"
  folder.mkdir()
  assert attention.resources(folder, _target()) == {}
  (folder / "module_0001.jit_f.thunk_sequence.txt").write_text(LAUNCHES)
  (folder / "module_0001.jit_f.ptx").write_text("")
  monkeypatch.setattr(attention, "_assembler", lambda: None)
  kernel = {"shared": 98304, "threads": 256}
  assert attention.resources(folder, _target()) == {"attention_forward": kernel}

  program = tmp_path / "ptxas"
  program.write_text(
    f"#!/bin/sh\necho $2 > {tmp_path}/asked\ncat >&2 <<END\n{ASSEMBLED}END\n"
  )
  program.chmod(0o755)
  monkeypatch.setattr(attention, "_assembler", lambda: str(program))
  kernel |= {"registers": 183, "spilled": 8}
  assert attention.resources(folder, _target()) == {"attention_forward": kernel}
  assert (tmp_path / "asked").read_text() == "-arch=sm_90a\n"
