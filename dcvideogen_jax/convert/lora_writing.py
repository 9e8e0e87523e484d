"""Writes low-rank updates as PEFT reads them: one file and its description.

What a run has trained as a whole (the patch embedding and the head in
DC-VideoGen's third phase) lies in the same file: modules as PEFT's
`modules_to_save`, single arrays, such as the head's modulation, by their plain
names. Alpha is in the file too, as an `.alpha` tensor per module and in the
header as diffusers has it, so that the file works alone. PEFT 0.21 puts all of
it where it belongs:

    model = diffusers.WanTransformer3DModel.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, directory)

On a base of another latent space the file is enough, since both ends are in it:

    wan = diffusers.WanTransformer3DModel.from_pretrained(
      "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="transformer")
    model = diffusers.WanTransformer3DModel.from_config(
      wan.config, in_channels=32, out_channels=32, patch_size=(1, 1, 1))
    ends = ("patch_embedding.", "proj_out.")
    rest = wan.state_dict().items()
    model.load_state_dict(
      {n: x for n, x in rest if not n.startswith(ends)}, strict=False)

diffusers reads low-rank updates alone, without anything trained as a whole:

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
# What a module's own parameters are called in PyTorch.
_OWN = ("weight", "bias")


def save_adapter(
  directory: str | os.PathLike[str],
  kind: str,
  variables: Mapping[str, Any],
  alpha: float,
  *,
  layout: str | None = None,
  dtype: jnp.dtype | None = None,
  base: str | None = None,
) -> list[pathlib.Path]:
  """Writes adapter_model.safetensors and adapter_config.json.

  `load_lora` reads them, and `load_part` what was trained as a whole.

  Args:
    directory: is made if it is missing.
    kind: a key of `KINDS`.
    variables: "lora", the collection of `layers.Dense`, and "params", those
      that take the place of the base's; there may be none.
    alpha: `lora_alpha` of the model; its rank is that of the factors. It is
      stored in float32, whatever `dtype` is.
    layout: one of the kind's, whose names are used; None is the first.
    dtype: of the stored weights; None keeps them as they are.
    base: what the update is for, for readers of the description.

  Returns:
    The files, the weights first.

  Raises:
    errors.UserError: if there is no update, something has no name in PyTorch,
      the layout is unknown, something is not finite or cannot be written, or
      other weights lie there.
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
  """Alpha for every module with an update."""
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
  """Both factors of every linear layer, and what PEFT finds the layers by.

  Those of blocks are found by the end of their names, which no other has.
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
  """One layer's factor, transposed as PyTorch has it."""
  array = np.asarray(leaf if layer is None else leaf[layer])
  return np.ascontiguousarray(array.T)


def _modules(tensors: Mapping[str, Any]) -> list[str]:
  """The modules that parameters belong to, but for those that have none."""
  split = [name.rpartition(".") for name in tensors]
  return sorted({module for module, _, own in split if own in _OWN})
