"""Diffusion forcing and teacher forcing of block-causal models.

Diffusion forcing (arXiv 2407.01392) gives every chunk of a clip its own noise
level, so that the model learns to continue earlier chunks of any noise level.
Teacher forcing shows each noisy chunk the clean chunks before it, as sampling
chunk by chunk does: the clean and noisy copies of a clip go through the model
as one sequence of tokens, under a mask that hides from a noisy chunk its own
clean copy. The two can be combined.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import wan_dit

_KEYS = {"per_chunk", "clean"}


class Forcing(NamedTuple):
  """How the noise levels of a clip are drawn.

  Attributes:
    per_chunk: whether each chunk has its own noise level; if not, the clip has
      one.
    clean: noise level of the clean copies, 0 or slightly more; None trains
      without clean copies.
    chunk: frames of tokens in a chunk; None if the model has no chunks.
    patch: latent frames of a token.
  """

  per_chunk: bool = False
  clean: float | None = None
  chunk: int | None = None
  patch: int = 1

  def chunks(self, frames: int) -> int | None:
    """Returns the number of noise levels of a clip; None is one for all chunks.

    Args:
      frames: latent frames of the clip.
    """
    if not self.per_chunk or self.chunk is None:
      return None
    return -(-frames // (self.chunk * self.patch))

  def by_frame(
    self, levels: Float[Array, "b ..."], frames: int, patch: int = 1
  ) -> Float[Array, "b ..."]:
    """Repeats the noise level of each chunk for its frames.

    Args:
      levels: noise levels, (b, chunks); levels of clips, (b,), are returned as
        they are.
      frames: latent frames of the clip.
      patch: latent frames that share a returned value: 1, or those of a token.

    Returns:
      (b, frames // patch) noise levels, or (b,).
    """
    if levels.ndim == 1:
      return levels
    assert self.chunk is not None
    repeated = jnp.repeat(levels, self.chunk * self.patch // patch, axis=1)
    return repeated[:, : frames // patch]


def read(config: Mapping[str, Any] | None, module: wan_dit.WanDiT) -> Forcing:
  """Reads the forcing of a config.

  Args:
    config: "per_chunk" and "clean", as in `Forcing`; None uses neither.
    module: the model that is trained.

  Raises:
    errors.UserError: for other keys, a clean level outside [0, 1), or forcing
      of a model without chunks.
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
