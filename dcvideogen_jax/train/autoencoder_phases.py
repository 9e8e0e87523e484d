"""The phases in which DC-AE-V is trained, as rows of a table.

NVIDIA has not published its training of DC-AE-V. These rows combine two public
recipes: what trains in each phase, and the learning rates, follow DC-AE (arXiv
2410.10733); optimiser, losses, frames and the share of images follow the video
DC-AE of Open-Sora 2.0 (hpcaitech/Open-Sora, commit 7ad6a96).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dcvideogen_jax import errors

Rules = tuple[tuple[str, bool], ...]


class Phase(NamedTuple):
  """What a phase trains, from where, on what, and by which loss.

  Attributes:
    what: the phase in a few words.
    start: "random", or "weights" for a phase that continues trained ones.
    trainable: ordered pairs of a regular expression over the names of variables
      and whether these variables train. "{coarsest}" stands for the number of
      the coarsest stage.
    loss: weight of each term; see `dc_ae_v.autoencoder`.
    optim: fields of the optimiser that differ from AdamW's in `configs.common`.
      "lr_scale" holds factors of the learning rate by pattern.
    frames: of a clip.
    size: height and width of a clip in pixels.
    images: share of the batches that are images.
    discriminator: fields of `adversarial.Adversary`, or None. Its "optim" are
      the fields that differ, as in `optim`.
    smaller: whether a smaller decoder trains in place of the model's own, which
      is its teacher; see `fast_decoder`.
  """

  what: str
  start: str
  trainable: Rules
  loss: Mapping[str, float]
  optim: Mapping[str, Any]
  frames: int = 40
  size: int = 256
  images: float = 0.2
  discriminator: Mapping[str, Any] | None = None
  smaller: bool = False

  @property
  def keeps_latents(self) -> bool:
    """Whether the encoder is frozen, and with it the scale of the latents."""
    return not any(on and "encoder" in name for name, on in self.trainable)


_NOTHING_ELSE = ((".*", False),)
_ALL = (("(encoder|decoder)/.*", True), *_NOTHING_ELSE)
_MIDDLE = (
  ("encoder/(stages_{coarsest}|project_out)/.*", True),
  ("decoder/(project_in|stages_{coarsest})/.*", True),
  *_NOTHING_ELSE,
)
_DECODER = (("decoder/.*", True), *_NOTHING_ELSE)
_PLAYERS = (("(decoder|discriminator)/.*", True), *_NOTHING_ELSE)
_LAST = (
  ("decoder/(stages_1|norm_out|project_out)/.*", True),
  ("discriminator/.*", True),
  *_NOTHING_ELSE,
)
_BOTH = (("(encoder|decoder|discriminator)/.*", True), *_NOTHING_ELSE)
_OPEN_SORA = {"lr": 5e-5, "betas": (0.9, 0.98), "decay": 0.0, "warmup": 1000}
_PERCEPTUAL = {"l1": 1.0, "lpips": 0.5}
_ADVERSARIAL = {**_PERCEPTUAL, "gan": 0.05}
_DISCRIMINATOR = {
  "width": 64,
  "layers": 5,
  "kernel": 3,
  "spectral": False,
  "r1": 0.0,
  "lecam": 0.0,
  "optim": {"lr": 1e-4, "betas": (0.5, 0.9), "warmup": 0},
}
_OPEN_SORA_DISCRIMINATOR = {
  **_DISCRIMINATOR,
  "optim": {"lr": 1e-4, "betas": (0.9, 0.98), "warmup": 0},
}

PHASES: Mapping[str, Phase] = {
  "low": Phase(
    "every layer, small pictures",
    "random",
    _ALL,
    _PERCEPTUAL,
    _OPEN_SORA,
  ),
  "high": Phase(
    "the layers around the latents, large pictures",
    "weights",
    _MIDDLE,
    _PERCEPTUAL,
    {**_OPEN_SORA, "lr": 1.6e-5, "decay": 1e-3},
    frames=80,
    size=512,
  ),
  "adversarial": Phase(
    "the last layers of the decoder, against a discriminator",
    "weights",
    _LAST,
    _ADVERSARIAL,
    {**_OPEN_SORA, "lr": 5.4e-5, "betas": (0.5, 0.9)},
    discriminator=_DISCRIMINATOR,
  ),
  # The rows below are not part of the recipe.
  "adversarial_all": Phase(
    "every layer, against a discriminator, as Open-Sora does",
    "weights",
    _BOTH,
    _ADVERSARIAL,
    _OPEN_SORA,
    discriminator=_OPEN_SORA_DISCRIMINATOR,
  ),
  "decoder": Phase(
    "the decoder alone, so that the latents stay as they are",
    "weights",
    _DECODER,
    _PERCEPTUAL,
    _OPEN_SORA,
  ),
  "adversarial_decoder": Phase(
    "the decoder alone, against a discriminator",
    "weights",
    _PLAYERS,
    _ADVERSARIAL,
    _OPEN_SORA,
    discriminator=_OPEN_SORA_DISCRIMINATOR,
  ),
  "fast": Phase(
    "a smaller decoder of the same latents",
    "weights",
    (("(decoder|projections)/.*", True), *_NOTHING_ELSE),
    {**_PERCEPTUAL, "teacher": 0.5, "features": 0.1},
    {**_OPEN_SORA, "lr": 1e-4},
    smaller=True,
  ),
  "pixels": Phase(
    "every layer, by the absolute difference alone",
    "random",
    _ALL,
    {"l1": 1.0},
    _OPEN_SORA,
    images=0.0,
  ),
}


def find(name: str) -> Phase:
  """Returns the phase of this name.

  Raises:
    errors.UserError: for an unknown name.
  """
  return errors.choose("phase", name, PHASES)


def trainable(phase: Phase, stages: int) -> Rules:
  """Returns a phase's rules for a model with this number of stages."""
  return tuple(
    (pattern.replace("{coarsest}", str(stages - 1)), trains)
    for pattern, trains in phase.trainable
  )
