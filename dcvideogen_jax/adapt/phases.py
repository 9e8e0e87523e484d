"""The phases of AE-Adapt-V, and what they are compared with, as data.

Follows DC-Gen `projects/DC-VideoGen/AE-Adapt-V.md` and
`dc_ai/videogencore/models/wan_t2v.py` (commit 562077c): what trains when.
"""

from collections.abc import Mapping
from typing import NamedTuple

from dcvideogen_jax import errors

Rules = tuple[tuple[str, bool], ...]


class Phase(NamedTuple):
  """What trains, and from where.

  Attributes:
    task: a key of `train.step.TASKS`.
    trainable: ordered (regular expression over the names of variables, bool).
    lora: whether the model has low-rank updates. They are where `WanDiT` has
      them: time embedding and projection, self-attention and feed-forward.
    starts: what a run can start from, one of
      "base": a transformer for the base's latents, of which all but the patch
        embedding and the output projection is copied;
      "weights": a transformer for the latents that are trained on;
      "random": nothing.
    what: it does, in a few words.
  """

  task: str
  trainable: Rules
  lora: bool
  starts: tuple[str, ...]
  what: str


_NOTHING_ELSE = ((".*", False),)
_PATCH = (("params/patch_embed/.*", True),)
_PATCH_AND_HEAD = (
  *_PATCH,
  ("params/head/.*", True),
  ("params/head_modulation", True),
)
_LORA = (("lora/.*", True), *_PATCH_AND_HEAD, *_NOTHING_ELSE)
_ALL = (("params/.*", True), *_NOTHING_ELSE)

PHASES: Mapping[str, Phase] = {
  # AE-Adapt-V is these three, each from the one before it.
  "embed": Phase(
    "align",
    (*_PATCH, *_NOTHING_ELSE),
    False,
    ("base",),
    "the patch embedding learns to give the base's tokens",
  ),
  "head": Phase(
    "denoise",
    (*_PATCH_AND_HEAD, *_NOTHING_ELSE),
    False,
    ("base",),
    "patch embedding and head around a frozen base",
  ),
  "lora": Phase(
    "denoise",
    _LORA,
    True,
    ("weights",),
    "patch embedding, head, low-rank updates",
  ),
  # "head" without a patch embedding from "embed" skips the first phase.
  "direct": Phase(
    "denoise", _LORA, True, ("base",), "what lora trains, without alignment"
  ),
  "full": Phase(
    "denoise", _ALL, False, ("weights", "base"), "every parameter, from weights"
  ),
  "scratch": Phase(
    "denoise", _ALL, False, ("random",), "every parameter, from nothing"
  ),
  "base": Phase(
    "denoise",
    _ALL,
    False,
    ("random", "weights"),
    "training of the base in its own latents",
  ),
}


def find(name: str) -> Phase:
  """The phase of a name.

  Raises:
    errors.UserError: for an unknown one.
  """
  if name not in PHASES:
    raise errors.UserError(
      f"phase must be one of {', '.join(PHASES)}, found {name!r}"
    )
  return PHASES[name]
