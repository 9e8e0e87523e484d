"""What the names in files of low-rank updates say, whoever wrote them.

Known are the names of PEFT and diffusers (`transformer.blocks.0.attn1.to_q.
lora_A.weight`), of Wan's own layout and ComfyUI (`diffusion_model.blocks.0.
self_attn.q.lora_down.weight`), of kohya and musubi (`lora_unet_blocks_0_self_
attn_q.lora_up.weight`), of LyCORIS (`lycoris_blocks_0_attn1_to_q.lora_up.
weight`), with or without `.alpha`, and whole differences that extracted files
and LyCORIS hold: `.diff` of weights, norms included, `.diff_b` of biases,
`.diff_m` of modulations, `.w_norm` and `.b_norm`.

Updates that are no sums of low-rank products are refused by their names.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.convert import naming, sources

Tensors = Mapping[str, sources.Tensor]

# What a name may start with, with every dot made an underscore.
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
# Before `.down` and `.up`, in early files of diffusers and transformers.
_OLD = r"(lora|lora_linear_layer)"
# What a tensor is, by the end of its name; adapters may have names.
_ROLES = {
  role: re.compile(rf"(?P<module>.+)\.{pattern}")
  for role, pattern in {
    "down": rf"(lora_A|lora_down|{_OLD}\.down)(\.(?!bias)\w+)?(\.weight)?",
    "up": rf"(lora_B|lora_up|{_OLD}\.up)(\.(?!bias)\w+)?(\.weight)?",
    "up_bias": rf"(lora_B|lora_up|{_OLD}\.up)(\.\w+)?\.bias",
    **{x: x for x in ("alpha", "diff", "diff_b", "diff_m", "w_norm", "b_norm")},
  }.items()
}
# Adapters of other kinds, by what only they have in their names.
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
# Where a difference belongs: what follows the name of the module.
_SUFFIXES = {
  "diff": ("_weight", ""),
  "diff_b": ("_bias",),
  "diff_m": ("_modulation",),
  "up_bias": ("_bias",),
  "w_norm": ("_weight",),
  "b_norm": ("_bias",),
}


class Update(NamedTuple):
  """The tensors of a low-rank update; `module` as the file calls it."""

  module: str
  place: naming.TensorSlot
  down: str
  up: str
  alpha: str | None


class Delta(NamedTuple):
  """A difference; `of` is the update by whose scale it is multiplied."""

  name: str
  place: naming.TensorSlot
  of: Update | None


class Names(NamedTuple):
  """What a file holds for a model, as far as names tell."""

  updates: list[Update]
  deltas: list[Delta]


def split(tensors: Tensors) -> tuple[Tensors, Tensors]:
  """Weights and, apart from them, the low-rank updates that lie among them.

  PEFT's names of weights that have an update (`.base_layer.`) become plain.
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
  """Raises `errors.UserError` if there are adapters of another kind.

  Args:
    tensors: what a file holds.
    what: names the file.
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
  """Finds what tensors update, in the layout that knows most of them.

  Tensors of other models are left out.

  Args:
    tensors: what a file holds.
    layouts: tables of the model.
    leaves: shapes of the model's parameters.
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
  """Name -> shape of all tensors that there should be."""
  found = {name: tensor.shape for name, tensor in tensors.items()}
  shapes = {}
  for update in names.updates:
    weight = update.place.torch_shape(leaves[update.place.jax])
    down = found.get(update.down, ())
    up = found.get(update.up, ())
    rank = [*down[:1], *up[1:2], 0][0]
    shapes[update.down] = (rank, *weight[1:])
    # Those of convolutions end in ones.
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
  """The module that a tensor belongs to, and what it is of it."""
  for role, expression in _ROLES.items():
    if match := expression.fullmatch(name):
      return match["module"], role
  return name, None


def _resolve(
  modules: Mapping[str, Mapping[str, str]],
  targets: Mapping[str, naming.TensorSlot],
) -> Names:
  """Finds modules among the tensors of one layout, by flat name."""
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
  """A name in kohya's manner, without what is around the model."""
  flat = name.replace(".", "_")
  while prefix := next((p for p in _PREFIXES if flat.startswith(p)), None):
    flat = flat.removeprefix(prefix)
  return flat


def _is_linear(place: naming.TensorSlot) -> bool:
  """Whether a kernel maps the other axes to its last, as in layers."""
  axes = place.rule.layout.axes
  return axes is not None and axes[-1] == 0
