"""The frozen encoders of `launch.precompute`: found, loaded, run in batches."""

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

# The parts that encode, and the kinds of model they are.
KINDS = {
  "dc_ae_v": "dc_ae_v",
  "wan_vae": "wan_vae",
  "text_encoder": "umt5",
  "image_encoder": "clip_vision",
}
_PARTS = (*KINDS, "tokenizer")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".json", ".model")

_SHORTEST_TEXT = 16
# What sizes are multiples of where there is no DC-AE-V.
FACTOR = 32


class Options(NamedTuple):
  """How clips are encoded.

  Attributes:
    frames: of a clip.
    batch: clips at a time.
    i2v: whether conditions and image features are wanted.
    stretch: shows CLIP the whole first frame.
    budget: bytes for encoding video beyond the weights.
    precision: of the autoencoders' convolutions in float32.
    text_dtype: of the text encoder.
    text_tokens: that a text may have.
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
  """Where the encoders lie.

  Args:
    task: "t2v" or "i2v"; only the latter has an image encoder.
    wholes: models as `model_names.pipeline` takes them; earlier ones come
      first.
    given: paths by the fields of `Paths`; they come before the models.

  Raises:
    errors.UserError: if one is missing or does not exist.
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
    # Of two autoencoders each comes from another model.
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
  """Raises UserError unless there is something to encode with."""
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
  """SHA-256 of the files of every encoder, by part."""
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
  """Loads what is there and encodes batches with it.

  Attributes:
    deep: the space of DC-AE-V, or None.
    base: that of Wan's autoencoder, or None.
    has_text: whether texts can be encoded.
    image_size: of what `clips` is given as pixels; None without CLIP.
    cut: texts so far that were longer than `options.text_tokens`.
  """

  cut: int = 0

  def __init__(self, paths: layouts.Paths, options: Options):
    """Loads.

    Raises:
      errors.UserError: if a model is damaged or does not fit.
    """
    self._options = options
    # None keeps the parameters as they are and computes in float32.
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
    """The sizes that a bucket's name stands for; errors of `buckets.find`."""
    return buckets.find(
      bucket, FACTOR if self.deep is None else self.deep.spatial
    )

  def facts(self) -> dict[str, Any]:
    """What a reader of the latents may want to know."""
    if self.deep is None:
      return {}
    return {"latent_scale": self.deep.module.latent_scale}

  @property
  def has_text(self) -> bool:
    return "text_encoder" in self._models

  @property
  def image_size(self) -> int | None:
    if "image_encoder" not in self._models:
      return None
    return self._models["image_encoder"][0].image_size

  def clips(
    self, video: np.ndarray, pixels: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    """Encodes clips.

    Args:
      video: uint8 (b, t, h, w, 3).
      pixels: what CLIP sees of each, float32 (b, s, s, 3), or None.

    Returns:
      By the names of `data.latents`, float32, with a leading axis.
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
    """Embeddings (s, e) of texts, without padding, float32.

    Texts of similar length are encoded together, and a text gets the same
    numbers whenever it comes with the same others.
    """
    tokens = self._options.text_tokens
    ids, mask = self._tokenizer(texts, tokens)
    self.cut += int((self._tokenizer.count(texts) > tokens).sum())
    lengths = mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    embeddings: list[Any] = [None] * len(texts)
    for start in range(0, len(texts), self._options.batch):
      rows = order[start : start + self._options.batch]
      # Few shapes, so that few programs are compiled.
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
