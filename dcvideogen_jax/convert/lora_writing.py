"""Writes low-rank updates for PEFT: one file of weights and its description.

The same file holds the parameters that a run has trained as a whole (the patch
embedding and the head in DC-VideoGen's third phase): modules as PEFT's
`modules_to_save`, and single arrays, such as the head's modulation, by their
plain names. The file also holds alpha, as an `.alpha` tensor per module and in
the header as diffusers writes it, so it can be used without its description.
PEFT 0.21 loads all of these parameters:

    model = diffusers.WanTransformer3DModel.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, directory)

A base of another latent space can be used as well, because the file holds both
the patch embedding and the head:

    wan = diffusers.WanTransformer3DModel.from_pretrained(
      "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="transformer")
    model = diffusers.WanTransformer3DModel.from_config(
      wan.config, in_channels=32, out_channels=32, patch_size=(1, 1, 1))
    ends = ("patch_embedding.", "proj_out.")
    rest = wan.state_dict().items()
    model.load_state_dict(
      {n: x for n, x in rest if not n.startswith(ends)}, strict=False)

diffusers reads the low-rank updates, but no parameters trained as a whole:

    model.load_lora_adapter(directory, prefix="base_model.model",
      weight_name="adapter_model.safetensors")
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dcvideogen_jax import errors, tree
from dcvideogen_jax.convert import (
  api,
  engine,
  lora_config,
  naming,
  sources,
  writing,
)

_PREFIX = "base_model.model."
_DOWN = ".lora_A.weight"
# PyTorch's names of a module's own parameters.
_OWN = ("weight", "bias")


def save_adapter(
  directory: str | os.PathLike[str],
  kind: str,
  variables: Mapping[str, Any],
  alpha: float,
  *,
  layout: str | None = None,
  dtype: DTypeLike | None = None,
  base: str | None = None,
) -> list[pathlib.Path]:
  """Writes adapter_model.safetensors and adapter_config.json.

  `load_lora` reads both files; `load_part` reads the parameters that were
  trained as a whole.

  Args:
    directory: directory to write; it is made if it is missing.
    kind: a key of `KINDS`.
    variables: "lora", the collection of `layers.Dense`, and "params", the
      parameters that replace those of the base, which may be left out.
    alpha: the model's `lora_alpha`, stored in float32 whatever `dtype` is. The
      rank is that of the factors.
    layout: name of one of the kind's layouts; None is the first.
    dtype: dtype of the stored weights; None keeps that of the variables.
    base: name or path of the base model, for the description.

  Returns:
    The paths of the files, the weights first.

  Raises:
    errors.UserError: if there is no update, a parameter has no name in PyTorch,
      the layout is unknown, a value is not finite, a file cannot be written, or
      the directory already holds other weights.
  """
  rules = api.rules_of(kind, layout)
  factors = tree.flatten(variables["lora"])
  if not factors:
    raise errors.UserError(f"there are no low-rank updates of {kind} to write")
  params = variables.get("params", {})
  _require_finite(kind, alpha, {**factors, **tree.flatten(params)})
  updates, targets = _updates(rules, factors)
  whole = engine.torch_tensors(rules, params)
  tensors = {_PREFIX + name: x for name, x in {**updates, **whole}.items()}
  if dtype is not None:
    tensors = {n: writing.cast(x, dtype) for n, x in tensors.items()}
  tensors |= _alphas(tensors, alpha)
  rank = next(x for n, x in factors.items() if n.endswith("/a")).shape[-1]
  config = {
    "base_model_name_or_path": base,
    "bias": "none",
    "inference_mode": True,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "lora_dropout": 0.0,
    "modules_to_save": _modules(whole),
    "peft_type": "LORA",
    "r": rank,
    "target_modules": targets,
    "task_type": None,
  }
  header = {_PREFIX + name: value for name, value in config.items()}
  return writing.write_directory(
    directory,
    "adapter_model",
    tensors,
    config,
    config_name=lora_config.NAME,
    metadata={lora_config.HEADER: json.dumps(header)},
  )


def _require_finite(kind: str, alpha: float, leaves: Mapping[str, Any]) -> None:
  """Raises UserError if alpha or an array holds NaN or infinity."""
  wrong = [n for n, x in leaves.items() if not jnp.isfinite(x).all()]
  if not math.isfinite(alpha):
    wrong.append(f"alpha ({alpha})")
  if wrong:
    raise errors.UserError(
      f"the updates of {kind} are not written, as there is NaN or infinity in"
      f" {', '.join(wrong)}"
    )


def _alphas(
  tensors: Mapping[str, sources.Tensor], alpha: float
) -> dict[str, sources.Tensor]:
  """Returns the tensor of alpha of every module with an update."""
  value = np.float32(alpha)
  read = functools.partial(np.asarray, value)
  return {
    name.removesuffix(_DOWN) + ".alpha": sources.Tensor((), value.dtype, read)
    for name in tensors
    if name.endswith(_DOWN)
  }


def _updates(
  rules: Sequence[naming.Rule], factors: Mapping[str, Any]
) -> tuple[dict[str, sources.Tensor], list[str]]:
  """Returns both factors of every linear layer, and PEFT's target_modules.

  PEFT finds the layers of blocks by the end of their names, which no other
  layer has.
  """
  kernels = {}
  for name, a in factors.items():
    module, _, factor = name.rpartition("/")
    if factor == "a":
      b = factors[f"{module}/b"]
      kernels[f"{module}/kernel"] = (*a.shape[:-1], b.shape[-1])
  if missing := naming.unknown(rules, kernels):
    raise errors.UserError(f"no rule converts {', '.join(missing)}")
  tensors: dict[str, sources.Tensor] = {}
  targets: dict[str, None] = {}
  for place in naming.places(rules, kernels):
    module = place.torch.removesuffix(".weight")
    targets[place.rule.torch.removesuffix(".weight").split("{i}.")[-1]] = None
    for factor, name in (("a", "lora_A"), ("b", "lora_B")):
      leaf = factors[place.jax.removesuffix("kernel") + factor]
      read = functools.partial(_transposed, leaf, place.layer)
      tensors[f"{module}.{name}.weight"] = sources.Tensor(
        (leaf.shape[-1], leaf.shape[-2]), np.dtype(leaf.dtype), read
      )
  return tensors, list(targets)


def _transposed(leaf: Any, layer: int | None) -> np.ndarray:
  """Returns a factor, or a layer of a stacked one, transposed for PyTorch."""
  array = np.asarray(leaf if layer is None else leaf[layer])
  return np.ascontiguousarray(array.T)


def _modules(tensors: Mapping[str, Any]) -> list[str]:
  """Returns the modules that have a weight or bias among the tensors."""
  split = [name.rpartition(".") for name in tensors]
  return sorted({module for module, _, own in split if own in _OWN})
