"""Counts the floating-point work of a traced function."""

import math
from typing import Any

_CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"


def count(jaxpr: Any) -> int:
  """FLOPs of the convolutions and matrix products in a jaxpr.

  A multiply-add is two. Bodies of scans count once per step; of the branches
  of a conditional the most expensive counts. cuDNN's attention is a call that
  nothing can be seen of: its two products of matrices count.
  """
  total = 0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape
      features = kernel[params["dimension_numbers"].rhs_spec[0]]
      per_output = math.prod(kernel) // features
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * per_output
    elif name == "dot_general":
      (contracting, _), _ = params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      reduced = math.prod(lhs[axis] for axis in contracting)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * reduced
    elif name == _CUDNN_ATTENTION:
      # Batch, tokens, heads, width: the layout of `ops.attention`.
      q, k = (x.aval.shape for x in eqn.invars[:2])
      total += 2 * 2 * math.prod(q) * k[1]
    elif name == "cond":
      total += max(count(branch.jaxpr) for branch in params["branches"])
    else:
      times = params.get("length", 1) if name == "scan" else 1
      total += times * sum(count(inner) for inner in _inner(params))
  return total


def _inner(params):
  """The jaxprs among an equation's parameters."""
  for value in params.values():
    if hasattr(value, "jaxpr"):
      value = value.jaxpr
    if hasattr(value, "eqns"):
      yield value
