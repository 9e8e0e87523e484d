"""The phases of AE-Adapt-V and the trainings that they are compared with.

The parameters that train in each phase follow DC-Gen
`projects/DC-VideoGen/AE-Adapt-V.md` and `dc_ai/videogencore/models/wan_t2v.py`
(commit 562077c).
"""

from collections.abc import Mapping
from typing import NamedTuple

from dcvideogen_jax import errors

Rules = tuple[tuple[str, bool], ...]


class Phase(NamedTuple):
  """Which variables a phase trains, and from which weights it starts.

  Attributes:
    task: a key of `train.step.TASKS`.
    trainable: ordered pairs of a regular expression over the names of variables
      and whether these variables train.
    lora: whether the model has low-rank updates. `WanDiT` has them in the time
      embedding and projection, the self-attention and the feed-forward.
    starts: the weights that a run can start from, each one of
      "base": a transformer for the base's latents, whose parameters are copied
        except those of the patch embedding and the output projection;
      "weights": a transformer for the latents that are trained on;
      "random": newly initialised parameters.
    what: the phase in a few words.
  """

  task: str
  trainable: Rules
  lora: bool
  starts: tuple[str, ...]
  what: str


# The last rule of a phase, and the only one of weights that are frozen.
NOTHING_ELSE: Rules = ((".*", False),)
_PATCH = (("params/patch_embed/.*", True),)
_PATCH_AND_HEAD = (
  *_PATCH,
  ("params/head/.*", True),
  ("params/head_modulation", True),
)
_LORA = (("lora/.*", True), *_PATCH_AND_HEAD, *NOTHING_ELSE)
_ALL = (("params/.*", True), *NOTHING_ELSE)
# The critic belongs to distribution matching; see `train.distil`.
_CRITIC = (("critic/.*", True),)
_LORA_ALONE = (("lora/.*", True), *_CRITIC, *NOTHING_ELSE)
_ALL_AND_CRITIC = (*_CRITIC, *_ALL)

PHASES: Mapping[str, Phase] = {
  # AE-Adapt-V consists of "embed", "head" and "lora"; each starts from the
  # result of the phase before it.
  "embed": Phase(
    "align",
    (*_PATCH, *NOTHING_ELSE),
    False,
    ("base",),
    "the patch embedding learns to give the base's tokens",
  ),
  "head": Phase(
    "denoise",
    (*_PATCH_AND_HEAD, *NOTHING_ELSE),
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
  # Distillation of an adapted model, or of any other.
  "guidance": Phase(
    "distil",
    _LORA_ALONE,
    True,
    ("weights",),
    "low-rank updates give the guided velocity in one evaluation",
  ),
  "few": Phase(
    "distil",
    _LORA_ALONE,
    True,
    ("weights",),
    "low-rank updates make a video in a few evaluations",
  ),
  "guidance_full": Phase(
    "distil",
    _ALL_AND_CRITIC,
    False,
    ("weights",),
    "the same as guidance, with every parameter",
  ),
  "few_full": Phase(
    "distil",
    _ALL_AND_CRITIC,
    False,
    ("weights",),
    "the same as few, with every parameter",
  ),
  # The phases below are not part of AE-Adapt-V. A run of "head" that starts
  # without a patch embedding from "embed" also skips the first phase.
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
  """Returns the phase of this name.

  Raises:
    errors.UserError: for an unknown name.
  """
  if name not in PHASES:
    raise errors.UserError(
      f"phase must be one of {', '.join(PHASES)}, found {name!r}"
    )
  return PHASES[name]
