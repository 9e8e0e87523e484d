"""DC-AE-V without its encoder, until a video has to be encoded."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dcvideogen_jax.latents import spaces, videos


class DecoderFirst(spaces.DCAEVLatents):
  """The latents of DC-AE-V; the encoder is loaded when it is first needed."""

  def __init__(
    self,
    module: Any,
    variables: spaces.Variables,
    encoder: Callable[[], spaces.Variables] | None = None,
    decoder: Any = None,
  ):
    """Builds the space.

    Args:
      module: the autoencoder.
      variables: those of its decoder.
      encoder: loads the variables of its encoder; None if there is none.
      decoder: as for `spaces.DCAEVLatents`.
    """
    super().__init__(module, variables, decoder)
    self._encoder = encoder

  def load_encoder(self) -> None:
    """Loads the encoder, unless it is there."""
    if self._encoder is not None:
      more = self._encoder()
      params = {**self.variables["params"], **more["params"]}
      self.variables, self._encoder = {"params": params}, None

  def encode_whole(self, video: videos.Video) -> spaces.Latents:
    """Encodes as `spaces.DCAEVLatents` does."""
    self.load_encoder()
    return super().encode_whole(video)

  def encode(
    self,
    video: Iterable[Any],
    size: spaces.Size,
    budget: float,
    tail: str = "pad",
  ) -> spaces.Latents:
    """Encodes as `spaces.DCAEVLatents` does."""
    self.load_encoder()
    return super().encode(video, size, budget, tail)

  def encode_stream(
    self, video: Iterable[Any], height: int, width: int, budget: float
  ) -> Iterator[spaces.Latents]:
    """Encodes as `spaces.DCAEVLatents` does."""
    self.load_encoder()
    return super().encode_stream(video, height, width, budget)
