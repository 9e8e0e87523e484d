"""Which models are on the device together while a video is sampled."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dcvideogen_jax import memory
from dcvideogen_jax.latents import latent_space, spaces
from dcvideogen_jax.plan import compiled

_GIB = 2**30


def halves(space: latent_space.LatentSpace) -> tuple[int, int]:
  """Returns the bytes of what encodes in an autoencoder, and what decodes."""
  params = space.variables["params"]
  if isinstance(space, spaces.WanVAELatents):
    # It is loaded as a whole.
    return compiled.size(params), compiled.size(params)
  encoder, decoder = params.get("encoder"), params["decoder"]
  return compiled.size(encoder), compiled.size(decoder)


class Group(NamedTuple):
  """Models that are on the device together.

  Attributes:
    weights: bytes of each model on one device.
    phases: names of the phases that they run.
  """

  weights: Mapping[str, int]
  phases: Sequence[str]


class Residency:
  """The groups of models, in the order in which they come and go."""

  def __init__(
    self,
    weights: Mapping[str, int],
    halves: tuple[int, int],
    text_encoder: str,
    limit: int,
    memory_budget: float | None,
  ):
    """Forms the groups.

    Args:
      weights: bytes of the models, of `sampling.weights`.
      halves: result of `halves`.
      text_encoder, memory_budget: as for `sampling.measure`.
      limit: bytes of a device that jax may use.

    Raises:
      compiled.TooLarge: if the weights of a group do not fit.
    """
    self._limit, self._budget = limit, memory_budget
    last, self.groups = dict(weights), []
    phases = ["text", "image", "condition", "denoise", "decode"]
    if text_encoder != "device":
      texts = {"text encoder": last.pop("text encoder")}
      phases.remove("text")
      if text_encoder == "once":
        self.groups.append(Group(texts, ["text"]))
    if text_encoder == "once" and "image encoder" in last:
      images = {"image encoder": last.pop("image encoder")}
      images["autoencoder, to encode"], last["autoencoder"] = halves
      self.groups.append(Group(images, ["image", "condition"]))
      phases = ["denoise", "decode"]
    self.groups.append(Group(last, phases))
    for group in self.groups:
      if self._left(group) <= 0:
        raise compiled.TooLarge(
          f"the weights alone take {sum(group.weights.values()) / _GIB:.1f} of "
          f"{limit / _GIB:.1f} GiB"
        )

  def _left(self, group: Group) -> int:
    return self._limit - sum(group.weights.values())

  def room(self, phase: str, held: int) -> float:
    """Returns the bytes that encoding or decoding may take in a phase.

    Args:
      phase: its name.
      held: bytes of the results of earlier phases that stay on the device.
    """
    if self._budget is not None:
      return self._budget
    (left,) = (self._left(x) for x in self.groups if phase in x.phases)
    return max(0, memory.SHARE * (left - held))

  def stays(self, phase: str) -> bool:
    """Whether the results of earlier phases stay on the device in a phase."""
    return phase in self.groups[-1].phases

  def weights(self) -> dict[str, int]:
    """Returns the bytes of all models, those of the last group first."""
    *before, last = self.groups
    found = dict(last.weights)
    for group in before:
      for name, n in group.weights.items():
        found[f"{name}, before the others"] = n
    return found

  def peak(self, phases: Mapping[str, Mapping[str, Any]]) -> int:
    """Returns the bytes of weights and largest phase that are there at once.

    Args:
      phases: as in the result of `sampling.measure`.
    """
    return max(
      sum(group.weights.values())
      + max(
        x["bytes"] + x["held"] for n, x in phases.items() if n in group.phases
      )
      for group in self.groups
    )
