"""Finds modules and factors in the tensor names of files of low-rank updates.

The names of these writers are known, with or without `.alpha`:

- PEFT and diffusers: `transformer.blocks.0.attn1.to_q.lora_A.weight`,
- Wan's own layout and ComfyUI:
  `diffusion_model.blocks.0.self_attn.q.lora_down.weight`,
- kohya and musubi: `lora_unet_blocks_0_self_attn_q.lora_up.weight`,
- LyCORIS: `lycoris_blocks_0_attn1_to_q.lora_up.weight`.

The tensors of LoHa, LoKr, DoRA and (IA)3 (`lora_forms`) follow a module's name
in the same way. Extracted files and LyCORIS also hold differences of whole
parameters: `.diff` of weights, including those of norms, `.diff_b` of biases,
`.diff_m` of modulations, `.w_norm` and `.b_norm` of norms.

Adapters of other kinds are recognised by their names and refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.convert import lora_forms, naming, sources

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
# Patterns of the ends of names, which may also contain the name of an adapter.
# The role is the one beside a pattern, or a part of the name.
_ENDS = [
  (re.compile(rf"(?P<module>.+)\.{pattern}"), role)
  for pattern, role in (
    (rf"(lora_A|lora_down|{_OLD}\.down)(\.(?!bias)\w+)?(\.weight)?", "down"),
    (rf"(lora_B|lora_up|{_OLD}\.up)(\.(?!bias)\w+)?(\.weight)?", "up"),
    (rf"(lora_B|lora_up|{_OLD}\.up)(\.\w+)?\.bias", "up_bias"),
    (r"lora_mid(\.weight)?", "mid"),
    (r"(?P<role>alpha|on_input|diff(_b|_m)?|[wb]_norm)", None),
    (
      r"(?P<role>lokr_w[12](_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]|ia3_l"
      r"|dora_scale|lora_magnitude_vector)(\.\w+)?(\.weight)?",
      None,
    ),
  )
]
# Other kinds of adapter -> words that only their tensors' names have.
_OTHER_KINDS = {
  kind: re.compile(rf".*[._]({pattern})([._].*)?")
  for kind, pattern in {
    "OFT or BOFT (rotations)": r"oft_(blocks|diag|[rRsS])|boft_[rRsS]",
    "GLoRA": r"(?<=\.)(a1|a2|b1|b2|bm)(?=\.weight$)",
    "VeRA": r"vera_lambda_[bd]",
    "AdaLoRA": r"lora_E",
    "KaSA": r"lora_diag",
    "MonteCLoRA": r"lora_monteclora_sampler",
    "VeLoRA": r"lora_velora_embed",
    "LoRA of embeddings": r"lora_embedding_[AB]",
    "LoRA of a layer that it widens": r"reshape_weight",
  }.items()
}
# The layers between the transformer and its latent space, which an adaptation
# replaces, by their flat names in both layouts.
_INTERFACE = re.compile(r"(patch_embedding|head_head|proj_out)_.*")
INTERFACE = "interface"
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
  """The tensors of an adapter of one weight.

  Attributes:
    module: name of the module in the file.
    place: the kernel, or part of one, that is updated.
    form: key of `lora_forms.FORMS`.
    names: role -> name of the tensor, of those that the file holds: of the
      form, "alpha", and the magnitude of DoRA.
    bias: the module's bias; None if it has none.
  """

  module: str
  place: naming.TensorSlot
  form: str
  names: Mapping[str, str]
  bias: naming.TensorSlot | None = None

  @property
  def magnitude(self) -> str | None:
    """The role of the magnitude of DoRA; None without one."""
    return next((x for x in lora_forms.MAGNITUDES if x in self.names), None)

  def name(self, role: str) -> str:
    """Returns the name of a tensor, or what it could be called."""
    ends = {"down": "lora_A.weight", "up": "lora_B.weight"}
    return self.names.get(role, f"{self.module}.{ends.get(role, role)}")


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
  """Splits tensors into weights and updates.

  PEFT inserts `.base_layer.` into the names of weights that have an update; it
  is removed.
  """
  updates = {n: t for n, t in tensors.items() if _role(n, tensors)[1]}
  if not updates:
    return tensors, {}
  weights = {
    name.replace(".base_layer.", "."): tensor
    for name, tensor in tensors.items()
    if name not in updates
  }
  return weights, updates


def without(tensors: Tensors, patterns: Sequence[str], what: str) -> Tensors:
  """Leaves out the tensors whose names contain one of the patterns.

  Args:
    tensors: the tensors of a file.
    patterns: regular expressions, or `INTERFACE` for those of the patch
      embedding and of the head's linear layer, in any spelling.
    what: the file, for messages.

  Raises:
    errors.UserError: if a pattern is no regular expression.
  """
  found = dict(tensors)
  for pattern in patterns:
    try:
      expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
      raise errors.UserError(
        f"{what}: skip={errors.brief(pattern)} is no regular expression: {e}"
      ) from e
    for name in [*found]:
      if pattern == INTERFACE:
        skipped = is_interface(name)
      else:
        skipped = expression.search(name) is not None
      if skipped:
        del found[name]
  return found


def is_interface(name: str) -> bool:
  """Whether a tensor belongs to the patch embedding or to the head's linear."""
  return _INTERFACE.fullmatch(_flat(name)) is not None


def require_known(tensors: Tensors, what: str) -> None:
  """Refuses adapters of kinds that are not read.

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
        " LoRA, DoRA, LoHa, LoKr, (IA)3 or differences of weights"
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
    module, role = _role(name, tensors)
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
  shapes: dict[str, naming.Shape] = {}
  for update in names.updates:
    weight = update.place.torch_shape(leaves[update.place.jax])
    own = {role: found[name] for role, name in update.names.items()}
    expected = lora_forms.FORMS[update.form].shapes(own, weight)
    if (role := update.magnitude) is not None:
      expected[role] = lora_forms.magnitude_shape(role, own[role], weight)
    for role in {"alpha", "on_input"} & own.keys():
      expected[role] = tuple(1 for _ in own[role])
    shapes |= {update.name(role): shape for role, shape in expected.items()}
  for delta in names.deltas:
    shape = delta.place.torch_shape(leaves[delta.place.jax])
    squeezed = [n for n in found[delta.name] if n != 1]
    same = squeezed == [n for n in shape if n != 1]
    shapes[delta.name] = found[delta.name] if same else shape
  return shapes


def _role(name: str, tensors: Tensors) -> tuple[str, str | None]:
  """Returns a tensor's module and role; the role is None if it has no role."""
  for expression, role in _ENDS:
    if match := expression.fullmatch(name):
      return match["module"], role or match["role"]
  module, _, end = name.rpartition(".")
  # LyCORIS calls the vector of (IA)3 a weight.
  if end == "weight" and f"{module}.on_input" in tensors:
    return module, end
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
    forms = [
      x for x, f in lora_forms.FORMS.items() if roles.keys() & {*f.roles}
    ]
    if place and _is_linear(place) and forms:
      known = {*lora_forms.FORMS[forms[0]].roles, "alpha"}
      if forms[0] != lora_forms.IA3:
        known |= {*lora_forms.MAGNITUDES}
      own = {role: name for role, name in roles.items() if role in known}
      bias = targets.get(f"{flat}_bias")
      update = Update(module, place, forms[0], own, bias)
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
