"""Embeds texts with the text encoder, which may go once all are embedded."""

import warnings
from typing import Any

import jax
import numpy as np

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.data import tables, tokenize
from dcvideogen_jax.latents import conditions
from dcvideogen_jax.sample import placement


def negative_prompt(task: str) -> str:
  """Returns Wan's own negative prompt for a task, "t2v" or "i2v"."""
  return tokenize.NEGATIVE_PROMPTS["wan" if task == "t2v" else "wan_i2v"]


class Embedder:
  """Embeds texts, each once: the embeddings are kept on the host.

  Attributes:
    texts: the tokenizer and the text encoder, a `loading.Texts`; None if there
      is none, or none any more.
  """

  def __init__(self, texts: Any, layout: placement.Layout | None = None):
    """Wraps a text encoder.

    Args:
      texts: as the attribute.
      layout: the layout that the encoder was loaded with, unless it is on the
        host.
    """
    self.texts = texts
    self._layout = layout
    self._known: dict[str, np.ndarray] = {}

  def __call__(self, prompt: str) -> np.ndarray:
    """Returns the embedding of a text (1, s, d), zero after its end.

    Raises:
      errors.UserError: if the text is new and there is no text encoder.
    """
    text = tokenize.clean(prompt)
    if text not in self._known:
      self._known[text] = self._embed(text)
    return self._known[text]

  def _embed(self, text):
    if self.texts is None:
      raise errors.UserError(f"there is no text encoder for {text!r}")
    tokenizer, (module, variables), length, on_host = self.texts
    (tokens,) = tokenizer.count([text])
    # Wan's own negative prompt is cut in training too, if texts are short.
    own = (tokenize.clean(negative_prompt(task)) for task in ("t2v", "i2v"))
    if tokens > length and text not in own:
      warnings.warn(
        f"the text {tables.short(text)} has {tokens} tokens, of which the "
        f"first {length} are read",
        stacklevel=3,
      )
    with placement.in_force(None if on_host else self._layout):
      embedding = conditions.encode_text(
        module, variables, *tokenizer([text], length)
      )
    return sharding.to_host(embedding)

  def free(self) -> None:
    """Frees the encoder's memory; embeddings of texts seen so far stay."""
    if self.texts is not None:
      for leaf in jax.tree.leaves(self.texts.encoder.variables):
        leaf.delete()
    self.texts = None
