"""Counts the FLOPs of functions, and holds the peak FLOP rates of devices."""

import contextlib
import fractions
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import xla_metadata

_HOPPER = {"bfloat16": 989.4e12, "float32": 494.7e12}

# Peak dense FLOPs per second by jax's name of the device and by dtype, from
# data sheets; products of bfloat16 are summed in float32. In float32 matrix
# products GPUs round the inputs to TF32 and TPUs to bfloat16, unless a program
# asks for more precision.
PEAKS: Mapping[str, Mapping[str, float]] = {
  "NVIDIA A100-SXM4-80GB": {"bfloat16": 312e12, "float32": 156e12},
  "NVIDIA H100 80GB HBM3": _HOPPER,
  "NVIDIA H200": _HOPPER,
  "NVIDIA B200": {"bfloat16": 2250e12, "float32": 1125e12},
  "NVIDIA L40S": {"bfloat16": 362.05e12, "float32": 183e12},
  "NVIDIA GeForce RTX 4090": {"bfloat16": 165.2e12, "float32": 82.6e12},
  "NVIDIA GeForce RTX 5090": {"bfloat16": 209.5e12, "float32": 104.8e12},
  "TPU v4": {"bfloat16": 275e12, "float32": 275e12},
  "TPU v5 lite": {"bfloat16": 197e12, "float32": 197e12},
  "TPU v5": {"bfloat16": 459e12, "float32": 459e12},
  "TPU v6 lite": {"bfloat16": 918e12, "float32": 918e12},
  # Half a chip: jax has one device for each of the two cores.
  "TPU7x": {"bfloat16": 1153.5e12, "float32": 1153.5e12},
}

_COMPUTED = "computed_blocks"  # Key of XLA's metadata; a value is "3/4".
# Number of matrix products in cuDNN's attention: the logits and the sum over
# values in the forward pass, five products in the backward pass.
_CUDNN_ATTENTION = {
  "dot_product_attention_fwd_wrapper": 2,
  "dot_product_attention_bwd_wrapper": 5,
}


def peak(devices: Iterable[jax.Device], dtype: str) -> float | None:
  """Returns the FLOPs per second of all devices; None if one is not in `PEAKS`.

  Args:
    devices: for instance those of a mesh.
    dtype: dtype of the matrix products, "bfloat16" or "float32".
  """
  known = [PEAKS.get(device.device_kind) for device in devices]
  return None if None in known else sum(peaks[dtype] for peaks in known)


def computed(blocks: int, of: int) -> contextlib.AbstractContextManager[None]:
  """Declares that kernels called in this context skip blocks of their grid.

  The share is kept in the metadata of the kernel's call and of the calls for
  its gradients, where `count` reads it.

  Args:
    blocks: number of blocks that are computed.
    of: number of blocks in the grid.
  """
  return xla_metadata.set_xla_metadata(**{_COMPUTED: f"{blocks}/{of}"})


def count(jaxpr: Any, kernels_only: bool = False) -> int:
  """Counts the FLOPs of the convolutions and matrix products in a jaxpr.

  A multiply-add is two FLOPs. The body of a scan counts once per step. A Pallas
  kernel counts its own cost estimate or, without one, its body once per block
  of its grid; under `computed` only the share that is computed counts. The body
  of a shard_map counts once per device. Of forms for several platforms the
  default counts, and of the branches of another conditional the most expensive
  one. cuDNN's attention is an opaque call, whose matrix products are counted
  from its shapes.

  Args:
    jaxpr: as `jax.jit(f).trace(...).jaxpr.jaxpr`.
    kernels_only: whether to count only Pallas kernels and cuDNN's attention.
  """
  return _count(jaxpr, not kernels_only, False)


def _count(jaxpr, everything: bool, in_kernel: bool) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name in _PRODUCTS:
      total += _PRODUCTS[name](eqn) if everything or in_kernel else 0
    elif name in _CUDNN_ATTENTION:
      # The layout of `ops.attention` is batch, tokens, heads, head width.
      q, k = (x.aval.shape for x in eqn.invars[:2])
      total += _CUDNN_ATTENTION[name] * 2 * math.prod(q) * k[1]
    elif name == "pallas_call" and params["cost_estimate"] is not None:
      total += params["cost_estimate"].flops
    else:
      kernel = in_kernel or name == "pallas_call"
      found = [_count(one, everything, kernel) for one in inner(params)]
      once = _chosen(params, found) if name == "cond" else sum(found)
      total += once and int(once * _times(name, params) * _part(eqn))
  return total


def _chosen(params, found: list[int]) -> int:
  """Returns the count of the branch that stands for a conditional."""
  platforms = params.get("branches_platforms") or ()
  return found[platforms.index(None)] if None in platforms else max(found)


def _convolution(eqn) -> int:
  kernel = eqn.invars[1].aval.shape
  features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  products = math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel)
  # Zeros between the numbers of the input, as in the gradient of a strided
  # convolution, are no work.
  return 2 * products // features // math.prod(eqn.params["lhs_dilation"])


def _dot(eqn) -> int:
  (contracting, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  reduced = math.prod(left[axis] for axis in contracting)
  return 2 * math.prod(eqn.outvars[0].aval.shape) * reduced


_PRODUCTS = {"conv_general_dilated": _convolution, "dot_general": _dot}


def _part(eqn) -> fractions.Fraction:
  """Returns the share of a kernel's grid that is computed; see `computed`."""
  metadata = eqn.ctx.xla_metadata
  if eqn.primitive.name == "pallas_call" and metadata:
    return fractions.Fraction(metadata.get(_COMPUTED, 1))
  return fractions.Fraction(1)


def _times(name: str, params) -> int:
  """Returns how many times the body of an equation runs."""
  if name == "scan":
    return params["length"]
  if name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  if name == "shard_map":
    # Newer versions of jax call the parameter "newly_manual_axes".
    (axes,) = (v for k, v in params.items() if k.endswith("manual_axes"))
    return math.prod(params["mesh"].shape[axis] for axis in axes)
  return 1


def inner(params: Mapping[str, Any]) -> Iterator[Any]:
  """Yields the jaxprs among an equation's parameters."""
  for value in params.values():
    for item in value if isinstance(value, tuple) else (value,):
      if hasattr(item, "jaxpr"):
        item = item.jaxpr
      if hasattr(item, "eqns"):
        yield item
