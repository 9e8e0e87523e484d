"""Finds, loads and runs the frozen encoders of `dcvideogen precompute`."""

import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import convert, errors
from dcvideogen_jax.data import buckets, tokenize
from dcvideogen_jax.latents import conditions, spaces
from dcvideogen_jax.sample import layouts, model_names

# The parts of a pipeline that encode, with their kind of model in
# `convert.KINDS`.
KINDS = {
  "dc_ae_v": "dc_ae_v",
  "wan_vae": "wan_vae",
  "text_encoder": "umt5",
  "image_encoder": "clip_vision",
}
_PARTS = (*KINDS, "tokenizer")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".json", ".model")

_SHORTEST_TEXT = 16  # Tokens that the shortest batch of texts is padded to.
# Without DC-AE-V, height and width of clips are multiples of this many pixels.
FACTOR = 32


class Options(NamedTuple):
  """How clips are encoded.

  Attributes:
    frames: frames of a clip.
    batch: clips, or texts, that are encoded together.
    i2v: whether condition latents and image features are encoded too.
    stretch: whether CLIP sees the whole first frame, stretched to a square.
    budget: bytes of device memory for encoding video, beyond the weights.
    precision: matmul precision of the autoencoders, which run in float32.
    text_dtype: dtype of the text encoder.
    text_tokens: tokens of a text; longer texts are cut.
  """

  frames: int
  batch: int
  i2v: bool
  stretch: bool
  budget: float
  precision: str
  text_dtype: str
  text_tokens: int


def find(
  task: str, wholes: Sequence[str | None], given: Mapping[str, str | None]
) -> layouts.Paths:
  """Returns the paths of the encoders.

  Args:
    task: "t2v" or "i2v". Only "i2v" has an image encoder.
    wholes: names of whole models, as `model_names.pipeline` takes them. Where
      two models have the same part, the earlier model provides it.
    given: paths of single parts, by the fields of `Paths`. They take precedence
      over the models.

  Raises:
    errors.UserError: if a path does not exist or a model lacks a part.
  """
  paths: dict[str, pathlib.Path] = {}
  for part, name in given.items():
    if name is not None:
      paths[part] = (
        model_names.weights(name) if part == "dc_ae_v" else pathlib.Path(name)
      )
      if not paths[part].exists():
        raise errors.UserError(f"there is no {part} at {name}")
  for name in wholes:
    if name is None:
      continue
    # `layouts.find` takes one autoencoder from a model, and none at all if
    # either autoencoder is in `without`.
    without = {"transformer", "scheduler", *paths} - {"dc_ae_v", "wan_vae"}
    if task == "t2v":
      without.add("image_encoder")
    located = layouts.find(model_names.pipeline(name), task, without)
    for part, path in located._asdict().items():
      if path is not None:
        paths.setdefault(part, path)
  if task == "t2v":
    paths.pop("image_encoder", None)
  return layouts.Paths(**paths)


def check(paths: layouts.Paths, i2v: bool) -> None:
  """Checks that the encoders suffice for the task.

  Args:
    paths: the encoders, of which any may be None.
    i2v: whether image features are encoded.

  Raises:
    errors.UserError: if there is no autoencoder, no image encoder for image to
      video, or only one of text encoder and tokenizer.
  """
  if paths.dc_ae_v is None and paths.wan_vae is None:
    raise errors.UserError(
      "there is no autoencoder: give --model or --dc_ae_v, --base or --base_vae"
    )
  if (paths.text_encoder is None) != (paths.tokenizer is None):
    raise errors.UserError(
      "text takes both an encoder and a tokenizer, found "
      f"{paths.text_encoder or paths.tokenizer} alone"
    )
  if i2v and paths.image_encoder is None:
    raise errors.UserError(
      "image to video takes CLIP, and there is none: give --image_encoder"
    )


def digests(paths: layouts.Paths) -> dict[str, str]:
  """Returns the SHA-256 of the files of each encoder, by part."""
  return {
    part: _digest(path)
    for part, path in paths._asdict().items()
    if part in _PARTS and path is not None
  }


def _digest(path: pathlib.Path) -> str:
  digest = hashlib.sha256()
  paths = [path] if path.is_file() else sorted(path.iterdir())
  for each in paths:
    if each.is_file() and each.name.endswith(_WEIGHTS):
      digest.update(each.name.encode() + b"\0")
      with open(each, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()


class Encoders:
  """Loads the encoders and encodes batches of clips and texts.

  Attributes:
    deep: the latent space of DC-AE-V, or None.
    base: the latent space of Wan's autoencoder, or None.
    cut: how many texts so far were longer than `options.text_tokens`.
  """

  cut: int = 0

  def __init__(self, paths: layouts.Paths, options: Options):
    """Loads the encoders onto the default device.

    Args:
      paths: the encoders; a part that is None is not loaded.
      options: how clips are encoded.

    Raises:
      errors.UserError: if a model is damaged, DC-AE-V does not take the number
        of frames, or the tokenizer has more tokens than the text encoder.
    """
    self._options = options
    # None keeps the dtype of the parameters and computes in float32.
    dtypes: dict[str, Any] = dict.fromkeys(KINDS)
    if options.text_dtype != "float32":
      dtypes["text_encoder"] = jnp.dtype(options.text_dtype)
    self._models = {
      part: convert.load(kind, getattr(paths, part), dtype=dtypes[part])
      for part, kind in KINDS.items()
      if getattr(paths, part) is not None
    }
    self.deep, self.base = (
      kind(*self._models[part]) if part in self._models else None
      for part, kind in (
        ("dc_ae_v", spaces.DCAEVLatents),
        ("wan_vae", spaces.WanVAELatents),
      )
    )
    if self.deep is not None:
      self.deep.clip_frames(options.frames)
    self._tokenizer = None
    if self.has_text:
      self._tokenizer = tokenize.Tokenizer.from_directory(paths.tokenizer)
      vocab = self._models["text_encoder"][0].vocab
      if self._tokenizer.vocab > vocab:
        raise errors.UserError(
          f"{paths.tokenizer} has {self._tokenizer.vocab} tokens, more than "
          f"the {vocab} of {paths.text_encoder}"
        )

  def sizes(self, bucket: str) -> tuple[buckets.Size, ...]:
    """Returns the sizes of a bucket's name.

    Raises:
      errors.UserError: as `buckets.find`.
    """
    return buckets.find(
      bucket, FACTOR if self.deep is None else self.deep.spatial
    )

  def facts(self) -> dict[str, Any]:
    """Returns facts for the readers of the latents, such as their scale."""
    if self.deep is None:
      return {}
    return {"latent_scale": self.deep.module.latent_scale}

  @property
  def has_text(self) -> bool:
    """Whether there is a text encoder."""
    return "text_encoder" in self._models

  @property
  def image_size(self) -> int | None:
    """Height and width in pixels of CLIP's input; None without CLIP."""
    if "image_encoder" not in self._models:
      return None
    return self._models["image_encoder"][0].image_size

  def clips(
    self, video: np.ndarray, pixels: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    """Encodes a batch of clips of one size.

    Args:
      video: uint8 (b, t, h, w, 3).
      pixels: first frames prepared for CLIP, float32 (b, s, s, 3) with s the
        `image_size`, or None without CLIP.

    Returns:
      Arrays by the names of `data.latents`, float32, with a leading axis b.

    Raises:
      errors.UserError: if a clip does not fit into the budget.
    """
    arrays, limits = {}, (self._options.frames, self._options.budget)
    with jax.default_matmul_precision(self._options.precision):
      for name, space in (("base", self.base), ("deep", self.deep)):
        if space is None:
          continue
        arrays[name] = space.encode_batch(video, *limits)
        if self._options.i2v:
          arrays[f"{name}_condition"] = space.encode_batch(
            video[:, 0], *limits, condition=True
          )
    if pixels is not None:
      model = self._models["image_encoder"]
      arrays["image"] = conditions.encode_images(*model, pixels)
    return jax.tree.map(np.asarray, arrays)

  def texts(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the embeddings of texts, without padding: float32 (s, e) each.

    Texts of similar length are encoded together. The result is deterministic:
    the same texts in the same order give the same numbers.
    """
    tokens = self._options.text_tokens
    ids, mask = self._tokenizer(texts, tokens)
    self.cut += int((self._tokenizer.count(texts) > tokens).sum())
    lengths = mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    embeddings: list[Any] = [None] * len(texts)
    for start in range(0, len(texts), self._options.batch):
      rows = order[start : start + self._options.batch]
      # Powers of two give few shapes, so that few programs are compiled.
      count = _power_of_two(len(rows), 1)
      length = _power_of_two(lengths[rows[-1]], _SHORTEST_TEXT)
      filled = np.resize(rows, count)
      hidden = np.asarray(
        _text(
          *self._models["text_encoder"],
          ids[filled, :length],
          mask[filled, :length],
        )
      )
      for row, embedding in zip(rows, hidden, strict=False):
        embeddings[row] = embedding[: lengths[row]].copy()
    return embeddings


def _power_of_two(n: int, least: int) -> int:
  return max(least, 1 << (int(n) - 1).bit_length())


_text = functools.partial(jax.jit, static_argnums=0)(conditions.text)
