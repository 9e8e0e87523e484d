"""How block-causal models are trained: noise by chunk, and clean copies.

Diffusion forcing (arXiv 2407.01392) gives every chunk of a clip a noise level
of its own, so that a model learns to go on from a past of any level. Teacher
forcing shows each noisy chunk the clean chunks before it, as sampling chunk by
chunk does: clean and noisy copies go through the model in one sequence, under a
mask that keeps a noisy chunk from its own clean copy. The two go together.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dcvideogen_jax import errors
from dcvideogen_jax.models import wan_dit

_KEYS = {"per_chunk", "clean"}


class Forcing(NamedTuple):
  """What noise the frames of a clip get.

  Attributes:
    per_chunk: whether each chunk has a level of its own, or the clip one.
    clean: level of the clean copies, 0 or little more; None for no copies.
    chunk: frames of tokens in a chunk of the model; None if it has none.
    patch: latent frames of a token.
  """

  per_chunk: bool = False
  clean: float | None = None
  chunk: int | None = None
  patch: int = 1

  def chunks(self, frames: int) -> int | None:
    """Levels of a clip of so many latent frames; None is one for all."""
    if not self.per_chunk or self.chunk is None:
      return None
    return -(-frames // (self.chunk * self.patch))

  def by_frame(
    self, levels: Float[Array, "b ..."], frames: int, patch: int = 1
  ) -> Float[Array, "b ..."]:
    """Levels of chunks become those of frames; one per clip stays.

    Args:
      levels: (b,) or (b, chunks).
      frames: latent frames of the clip.
      patch: latent frames that share a value, 1 or the token's.
    """
    if levels.ndim == 1:
      return levels
    assert self.chunk is not None
    repeated = jnp.repeat(levels, self.chunk * self.patch // patch, axis=1)
    return repeated[:, : frames // patch]


def read(config: Mapping[str, Any] | None, module: wan_dit.WanDiT) -> Forcing:
  """The forcing of a config.

  Args:
    config: "per_chunk" and "clean", as of `Forcing`; None for neither.
    module: the model that is trained.

  Raises:
    errors.UserError: for other keys, a level below 0 or not below 1, or a
      model without a chunk.
  """
  chunk, patch = module.chunk, module.patch[0]
  if config is None:
    return Forcing(chunk=chunk, patch=patch)
  if set(config) != _KEYS:
    raise errors.UserError(
      f"forcing needs exactly the keys {', '.join(sorted(_KEYS))}, found "
      f"{sorted(config)}"
    )
  per_chunk, clean = bool(config["per_chunk"]), config["clean"]
  if clean is not None and not 0 <= clean < 1:
    raise errors.UserError(
      f"forcing.clean, a noise level, must be from 0 up to 1, found {clean!r}"
    )
  if chunk is None and (per_chunk or clean is not None):
    raise errors.UserError(
      "forcing is for block-causal models: expected a config.model.chunk, "
      "found none"
    )
  return Forcing(per_chunk, clean, chunk, patch)
