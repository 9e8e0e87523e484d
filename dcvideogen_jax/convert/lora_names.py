"""Finds modules and factors in the tensor names of files of low-rank updates.

The names of these writers are known, with or without `.alpha`:

- PEFT and diffusers: `transformer.blocks.0.attn1.to_q.lora_A.weight`,
- Wan's own layout and ComfyUI:
  `diffusion_model.blocks.0.self_attn.q.lora_down.weight`,
- kohya and musubi: `lora_unet_blocks_0_self_attn_q.lora_up.weight`,
- LyCORIS: `lycoris_blocks_0_attn1_to_q.lora_up.weight`.

Extracted files and LyCORIS also hold differences of whole parameters: `.diff`
of weights, including those of norms, `.diff_b` of biases, `.diff_m` of
modulations, `.w_norm` and `.b_norm` of norms.

Adapters of other kinds are recognised by their names and refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.convert import naming, sources

Tensors = Mapping[str, sources.Tensor]

# Prefixes of names, in which every dot has become an underscore.
_PREFIXES = (
  "base_model_model_",
  "model_",
  "module_",
  "_orig_mod_",
  "diffusion_model_",
  "transformer_",
  "unet_",
  "pipe_",
  "dit_",
  "lora_unet_",
  "lora_transformer_",
  "lycoris_",
  "_",
)
# Early files of diffusers and transformers have these before `.down` and `.up`.
_OLD = r"(lora|lora_linear_layer)"
# Role of a tensor -> pattern of the end of its name, which may also contain the
# name of an adapter.
_ROLES = {
  role: re.compile(rf"(?P<module>.+)\.{pattern}")
  for role, pattern in {
    "down": rf"(lora_A|lora_down|{_OLD}\.down)(\.(?!bias)\w+)?(\.weight)?",
    "up": rf"(lora_B|lora_up|{_OLD}\.up)(\.(?!bias)\w+)?(\.weight)?",
    "up_bias": rf"(lora_B|lora_up|{_OLD}\.up)(\.\w+)?\.bias",
    **{x: x for x in ("alpha", "diff", "diff_b", "diff_m", "w_norm", "b_norm")},
  }.items()
}
# Other kinds of adapter -> words that only their tensors' names have.
_OTHER_KINDS = {
  kind: re.compile(rf".*[._]({pattern})([._].*)?")
  for kind, pattern in {
    "LoKr (Kronecker products)": r"lokr_[wt]\d?",
    "LoHa (Hadamard products)": r"hada_[wt]\d?",
    "DoRA (directions and magnitudes)": r"dora_scale|lora_magnitude_vector",
    "(IA)3 (learned scales)": r"ia3_l|on_input",
    "LoCon in Tucker's form": r"lora_mid",
    "OFT or BOFT (rotations)": r"oft_(blocks|diag|[rRsS])|boft_[rRsS]",
    "GLoRA": r"(?<=\.)(a1|a2|b1|b2|bm)(?=\.weight$)",
    "VeRA": r"vera_lambda_[bd]",
    "AdaLoRA": r"lora_E",
    "KaSA": r"lora_diag",
    "MonteCLoRA": r"lora_monteclora_sampler",
    "VeLoRA": r"lora_velora_embed",
    "LoRA of embeddings": r"lora_embedding_[AB]",
  }.items()
}
# Role of a difference -> what follows the module in the parameter's flat name.
_SUFFIXES = {
  "diff": ("_weight", ""),
  "diff_b": ("_bias",),
  "diff_m": ("_modulation",),
  "up_bias": ("_bias",),
  "w_norm": ("_weight",),
  "b_norm": ("_bias",),
}


class Update(NamedTuple):
  """The tensors of a low-rank update.

  Attributes:
    module: name of the module in the file.
    place: the kernel, or part of one, that is updated.
    down: name of the factor (rank, in).
    up: name of the factor (out, rank).
    alpha: name of the tensor of alpha; None if the file holds none.
  """

  module: str
  place: naming.TensorSlot
  down: str
  up: str
  alpha: str | None


class Delta(NamedTuple):
  """A difference that is added to a parameter.

  Attributes:
    name: name of the tensor.
    place: the parameter, or part of one, that is updated.
    of: the update whose factor also scales the difference, or None.
  """

  name: str
  place: naming.TensorSlot
  of: Update | None


class Names(NamedTuple):
  """The updates and differences of a model that the names in a file tell."""

  updates: list[Update]
  deltas: list[Delta]


def split(tensors: Tensors) -> tuple[Tensors, Tensors]:
  """Splits tensors into weights and low-rank updates.

  PEFT inserts `.base_layer.` into the names of weights that have an update; it
  is removed.
  """
  updates = {n: t for n, t in tensors.items() if _role(n)[1] is not None}
  if not updates:
    return tensors, {}
  weights = {
    name.replace(".base_layer.", "."): tensor
    for name, tensor in tensors.items()
    if name not in updates
  }
  return weights, updates


def require_low_rank(tensors: Tensors, what: str) -> None:
  """Refuses adapters of other kinds than LoRA.

  Args:
    tensors: the tensors of a file.
    what: the file, for the message.

  Raises:
    errors.UserError: names the kind of adapter.
  """
  for kind, expression in _OTHER_KINDS.items():
    if name := next((n for n in tensors if expression.fullmatch(n)), None):
      raise errors.UserError(
        f"{what} holds {kind}, such as {name}, which is not read: expected"
        " LoRA, products of two factors"
      )


def parse(
  tensors: Tensors,
  layouts: Mapping[str, Sequence[naming.Rule]],
  leaves: Mapping[str, naming.Shape],
) -> Names:
  """Finds the parameters that tensors update, in the layout that fits best.

  Tensors that are not the model's are left out.

  Args:
    tensors: the tensors of a file.
    layouts: the model's tables.
    leaves: name -> shape of the model's parameters.
  """
  modules: dict[str, dict[str, str]] = {}
  for name in tensors:
    module, role = _role(name)
    if role is not None:
      modules.setdefault(module, {}).setdefault(role, name)
  candidates = [
    _resolve(modules, {_flat(p.torch): p for p in naming.places(rules, leaves)})
    for rules in layouts.values()
  ]
  return max(candidates, key=lambda n: len(n.updates) + len(n.deltas))


def expected_shapes(
  names: Names, tensors: Tensors, leaves: Mapping[str, naming.Shape]
) -> dict[str, naming.Shape]:
  """Returns name -> shape of the tensors that the updates should consist of.

  Args:
    names: from `parse`.
    tensors: the tensors of the file, which give ranks.
    leaves: name -> shape of the model's parameters.
  """
  found = {name: tensor.shape for name, tensor in tensors.items()}
  shapes = {}
  for update in names.updates:
    weight = update.place.torch_shape(leaves[update.place.jax])
    down = found.get(update.down, ())
    up = found.get(update.up, ())
    rank = [*down[:1], *up[1:2], 0][0]
    shapes[update.down] = (rank, *weight[1:])
    # The up factor of a convolution has kernel axes of size 1 at its end.
    shapes[update.up] = (weight[0], rank, *(1 for _ in up[2:]))
    if update.alpha is not None:
      shapes[update.alpha] = tuple(1 for _ in found[update.alpha])
  for delta in names.deltas:
    shape = delta.place.torch_shape(leaves[delta.place.jax])
    squeezed = [n for n in found[delta.name] if n != 1]
    same = squeezed == [n for n in shape if n != 1]
    shapes[delta.name] = found[delta.name] if same else shape
  return shapes


def _role(name: str) -> tuple[str, str | None]:
  """Returns a tensor's module and role; the role is None if it has no role."""
  for role, expression in _ROLES.items():
    if match := expression.fullmatch(name):
      return match["module"], role
  return name, None


def _resolve(
  modules: Mapping[str, Mapping[str, str]],
  targets: Mapping[str, naming.TensorSlot],
) -> Names:
  """Finds the slots of modules in one layout by their flat names."""
  names = Names([], [])
  for module, roles in modules.items():
    flat = _flat(module)
    update = None
    place = targets.get(f"{flat}_weight")
    if place and _is_linear(place) and {"down", "up"} & roles.keys():
      down = roles.get("down", f"{module}.lora_A.weight")
      up = roles.get("up", f"{module}.lora_B.weight")
      update = Update(module, place, down, up, roles.get("alpha"))
      names.updates.append(update)
    for role, suffixes in _SUFFIXES.items():
      places = [targets[flat + s] for s in suffixes if flat + s in targets]
      if role in roles and places and (role != "up_bias" or update):
        of = update if role == "up_bias" else None
        names.deltas.append(Delta(roles[role], places[0], of))
  return names


def _flat(name: str) -> str:
  """Returns a name with underscores for dots, as kohya's, without prefixes."""
  flat = name.replace(".", "_")
  while prefix := next((p for p in _PREFIXES if flat.startswith(p)), None):
    flat = flat.removeprefix(prefix)
  return flat


def _is_linear(place: naming.TensorSlot) -> bool:
  """Whether a kernel maps its other axes to its last, as linear layers do."""
  axes = place.rule.layout.axes
  return axes is not None and axes[-1] == 0
