"""Turns prompts into tokens of UMT5, as Wan 2.1 does.

Follows Wan 2.1 `wan/modules/tokenizers.py` (commit 9737cba) and `WanPipeline`
of diffusers (commit 58eb52c), which agree. Unknown pieces become token 3, as
tokenizer.json says. transformers 5 turns them into token 2, which is right for
T5 but not for UMT5.
"""

import html
import os
import pathlib
import re
from collections.abc import Sequence

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Int

from dcvideogen_jax import errors
from dcvideogen_jax.data import tables

# Text tokens that Wan's transformer attends to.
LENGTH = 512

_PAD, _END = "<pad>", "</s>"

_WAN = (
  "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，"
  "整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
  "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
  "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_SHAKE = "镜头晃动，"

# "wan": Wan's own negative prompt (`wan/configs`, commit 9737cba); for image to
# video it begins with camera shake. "ascii": the same with ASCII commas, as in
# DC-VideoGen's training; `clean` makes the two equal. "english": the negative
# prompt of DC-Gen's `generate.py` (commit cae2205).
NEGATIVE_PROMPTS = {
  "wan": _WAN,
  "wan_i2v": _SHAKE + _WAN,
  "ascii": _WAN.replace("，", ","),
  "ascii_i2v": (_SHAKE + _WAN).replace("，", ","),
  "english": (
    "Bright tones, overexposed, static, blurred details, subtitles, style, "
    "works, paintings, images, static, overall gray, worst quality, low "
    "quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen "
    "limbs, fused fingers, still picture, messy background, three legs, many "
    "people in the background, walking backwards"
  ),
}


def clean(prompt: str) -> str:
  """Repairs encoding mistakes, HTML entities and white space of a prompt.

  Full-width letters and punctuation become ASCII.
  """
  text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
  return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
  """Turns prompts into tokens.

  Attributes:
    vocab: number of tokens in the vocabulary; the text encoder must have at
      least as many embeddings.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    """Wraps a tokenizer of the T5 family; see `from_directory`.

    Raises:
      errors.UserError: if the tokenizer has no padding token or does not end a
        text with the end token.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = {name: tokenizer.token_to_id(name) for name in (_PAD, _END)}
    if missing := [name for name, i in ids.items() if i is None]:
      raise errors.UserError(
        f"the tokenizer has no token {', '.join(missing)}, as T5's have"
      )
    if tokenizer.encode("").ids != [ids[_END]]:
      raise errors.UserError(
        f"the tokenizer does not end a text with {_END}, as T5's do"
      )
    self._tokenizer = tokenizer
    self._pad = ids[_PAD]
    self.vocab = tokenizer.get_vocab_size()

  @classmethod
  def from_directory(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
    """Reads the tokenizer.json of a directory.

    Raises:
      errors.UserError: if the directory has no tokenizer.json, or it is not a
        tokenizer of the T5 family.
    """
    directory = pathlib.Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
      if (directory / "spiece.model").is_file():
        raise errors.UserError(
          f"{directory} holds spiece.model but no tokenizer.json: loading it "
          "with transformers' AutoTokenizer and save_pretrained writes one"
        )
      raise errors.UserError(f"there is no tokenizer {path}")
    try:
      tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises plain Exception.
      raise errors.UserError(f"{path} is not a tokenizer: {e}") from e
    return cls(tokenizer)

  def __call__(
    self,
    prompts: Sequence[str],
    length: int = LENGTH,
    keep_end: bool = True,
  ) -> tuple[Int[np.ndarray, "b s"], Int[np.ndarray, "b s"]]:
    """Cleans and tokenises prompts.

    Args:
      prompts: the texts.
      length: tokens in each row. Shorter texts are padded, longer texts are
        cut.
      keep_end: whether a text that is cut still ends with the end token, as in
        both references. DC-VideoGen's trainer slices the tokens and loses it.

    Returns:
      Token ids and a mask, int32: 1 for tokens of the text, 0 for padding. A
      row without padding may have been cut; `count` tells.

    Raises:
      errors.UserError: if `length` is not positive, or a text holds half of a
        surrogate pair.
    """
    if length < 1:
      raise errors.UserError(
        f"expected room for at least one token, found {length}"
      )
    ids = np.full((len(prompts), length), self._pad, np.int32)
    mask = np.zeros_like(ids)
    for row, known, encoded in zip(
      ids, mask, self._encode(prompts), strict=True
    ):
      tokens = encoded[:length]
      row[: len(tokens)] = tokens
      known[: len(tokens)] = 1
      if keep_end:
        row[len(tokens) - 1] = encoded[-1]
    return ids, mask

  def count(self, prompts: Sequence[str]) -> np.ndarray:
    """Returns the number of tokens of each text before cutting: int64 (b,).

    The end token is counted.

    Raises:
      errors.UserError: if a text holds half of a surrogate pair.
    """
    return np.array([len(ids) for ids in self._encode(prompts)], np.int64)

  def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
    for prompt in prompts:
      # `clean` would silently replace half of a surrogate pair.
      tables.require_text(prompt, "the text")
    encodings = self._tokenizer.encode_batch([clean(p) for p in prompts])
    return [encoding.ids for encoding in encodings]
