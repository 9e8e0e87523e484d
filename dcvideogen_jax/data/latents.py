"""Reads clips that were encoded beforehand: records, and batches for training.

A folder of `dcvideogen precompute` (`data.parts` gives its layout) holds
records. A record consists of named arrays:

  base            (t, h, w, c)  latents of the base model's autoencoder: the
                  mean of the posterior, normalised
  deep            (t, h, w, c)  latents of DC-AE-V, times its scale; the same t
  base_condition  (t, h, w, c)  latents of the condition video, which shows the
                  first frame and then mid-grey, like "base"
  deep_condition  (t, h, w, c)  latents of the condition video, like "deep"
  text            (s, e)        embedding of a caption, without padding; one
                  array for each caption
  image           (m, e)        CLIP's features of the first frame

and of metadata of the clip as JSON: "file", "captions", "scores" (or null) and
"fps". Arrays whose encoder was not given are missing. All clips of a bucket
have the same arrays with equal shapes, except for "text".
"""

import json
import os
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import grain
import ml_dtypes
import numpy as np
import safetensors
from grain import sources as grain_sources
from jaxtyping import Float
from safetensors import numpy as safetensors_numpy

from dcvideogen_jax import documents, errors
from dcvideogen_jax.data import buckets, descriptions
from dcvideogen_jax.data import options as options_lib
from dcvideogen_jax.data import records as records_lib

KEYS = ("base", "deep", "base_condition", "deep_condition", "text", "image")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
INDEX, NEGATIVE = "index.json", "negative.safetensors"
FORMAT = 1
# A caption is drawn in proportion to this power of its score, as in the
# official training.
SCORE_POWER = 10

_LENGTH = struct.Struct("<Q")
_STORED = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
_META = "__metadata__"
# Exceptions that parsing a damaged record may raise.
_MALFORMED = (struct.error, AttributeError, KeyError, TypeError, ValueError)
_REQUIRED = ("source", "path")
_DEFAULTS = {"keys": None, "text_tokens": 512, "latent_frames": None}
_OVER_TIME = ("base", "deep", "base_condition", "deep_condition")


def encode(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
  """Returns the record of a clip, in the format of safetensors.

  Args:
    arrays: float32 or bfloat16 arrays, by the names in `KEYS`; "text" is a list
      of arrays.
    meta: metadata of the clip; anything that JSON can hold.

  Raises:
    ValueError: for another name or dtype.
  """
  flat = {}
  for name, value in arrays.items():
    if name not in KEYS:
      raise ValueError(f"a record has no {name!r}, only {KEYS}")
    several = value if name == "text" else [value]
    for i, array in enumerate(several):
      if array.dtype not in _STORED.values():
        raise ValueError(f"{name} is {array.dtype}, not one of {[*DTYPES]}")
      key = f"text.{i}" if name == "text" else name
      flat[key] = np.ascontiguousarray(array)
  # With a single key of metadata the bytes are deterministic: safetensors
  # writes several keys in any order.
  return safetensors_numpy.save(
    flat, {"meta": json.dumps(meta, ensure_ascii=False)}
  )


def decode(
  record: bytes, keys: Sequence[str] = KEYS
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the arrays and the metadata of a record.

  Args:
    record: a record that `encode` made.
    keys: names of the arrays to read; the record may lack some. "text" gives a
      list of arrays.

  Raises:
    ValueError: if the record was not made by `encode` or is truncated.
  """
  try:
    (length,) = _LENGTH.unpack_from(record)
    header = documents.parse(record[_LENGTH.size : _LENGTH.size + length])
    meta = documents.parse(header[_META]["meta"])
    # Deserialising refuses arrays that overlap or leave bytes unused.
    flat = {}
    for key, entry in safetensors.deserialize(record):
      if key.partition(".")[0] in keys:
        array = np.frombuffer(entry["data"], _STORED[entry["dtype"]])
        flat[key] = array.reshape(entry["shape"])
  except (*_MALFORMED, safetensors.SafetensorError) as e:
    raise ValueError(f"it is no record of encoded clips: {e!r}") from e
  texts = [key for key in flat if key.startswith("text.")]
  texts.sort(key=lambda key: int(key.partition(".")[2]))
  arrays = {key: flat[key] for key in flat if key not in texts}
  if texts:
    arrays["text"] = [flat[key] for key in texts]
  return arrays, meta


def caption_weights(count: int, scores: Sequence[float] | None) -> np.ndarray:
  """Returns the probability of each caption of a clip: float64 (count,).

  A probability is proportional to the tenth power of the caption's score. The
  captions are equally likely without scores, or where all scores are zero.

  Args:
    count: number of captions, at least 1.
    scores: a score of 0 or more for each caption, or None.
  """
  if scores is None or max(scores) <= 0:
    return np.full(count, 1 / count)
  # Divided by the largest score, as the power of a large score may overflow.
  weights = (np.asarray(scores, np.float64) / max(scores)) ** SCORE_POWER
  return weights / weights.sum()


def padded(text: np.ndarray, tokens: int) -> Float[np.ndarray, "{tokens} e"]:
  """Returns a text's embedding padded with zeros to `tokens`, float32.

  Raises:
    errors.UserError: if the text has more tokens. It is not cut here, because
      sampling cuts a text before it is encoded, which gives other embeddings.
  """
  require_tokens(len(text), tokens)
  row = np.zeros((tokens, text.shape[-1]), np.float32)
  row[: len(text)] = text
  return row


def require_tokens(found: int, tokens: int) -> None:
  """Checks that a text of `found` tokens has at most `tokens`.

  Raises:
    errors.UserError: if the text has more tokens.
  """
  if found > tokens:
    raise errors.UserError(
      f"a text has {found} tokens, expected at most the text_tokens "
      f"{tokens}: encode with `dcvideogen precompute "
      f"--text_tokens={tokens}`, as sampling will"
    )


def read_index(directory: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads the index of a folder of encoded clips.

  Returns:
    A dictionary of
      records: the number of clips.
      settings: the settings of the encoding.
      facts: facts such as "latent_scale", the scale of DC-AE-V's latents.
      buckets: for each bucket's name, "records", the number of its clips, and
        "shapes", the shape of each array by name; None for "text".
      parts: for each part's name, the number of clips by bucket.

  Raises:
    errors.UserError: if the folder has no index, or the index is damaged or in
      another format.
  """
  path = pathlib.Path(directory) / INDEX
  try:
    index = documents.parse(path.read_bytes())
    if index["format"] != FORMAT:
      raise errors.UserError(
        f"{path} has the format {index['format']}, expected {FORMAT}: make the "
        "folder again with `dcvideogen precompute`"
      )
    descriptions.require(index, descriptions.INDEX)
  except FileNotFoundError as e:
    raise errors.UserError(
      f"{directory} has no {INDEX}: it is not a folder of "
      "`dcvideogen precompute`, or the encoding has not finished"
    ) from e
  except errors.UserError:
    raise
  except (OSError, KeyError, TypeError, ValueError) as e:
    raise errors.UserError(f"cannot read {path}, it is damaged: {e}") from e
  return index


def negative(
  directory: str | os.PathLike[str],
) -> Float[np.ndarray, "s e"]:
  """Returns the negative prompt's embedding, which replaces a dropped text.

  Raises:
    errors.UserError: if the folder has no such embedding, or it is damaged.
  """
  path = pathlib.Path(directory) / NEGATIVE
  try:
    arrays, _ = decode(path.read_bytes(), ("text",))
  except FileNotFoundError as e:
    raise errors.UserError(
      f"{directory} has no {NEGATIVE}: it was made without a text encoder"
    ) from e
  except (OSError, ValueError, KeyError) as e:
    raise errors.UserError(f"cannot read {path}: {e}") from e
  embedding: np.ndarray = arrays["text"][0].astype(np.float32)
  return embedding


class Records:
  """Gives Grain random access to the records of one bucket.

  `records[i]` holds the bytes of a record, for `decode`.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    bucket: str,
    index: Mapping[str, Any] | None = None,
  ):
    """Opens the shards of the bucket.

    Args:
      directory: the folder of encoded clips.
      bucket: a key of the index's "buckets".
      index: the folder's index, if it has been read already.

    Raises:
      errors.UserError: if a shard is missing, damaged or has another number of
        records than the index says.
    """
    self._directory, self._bucket = pathlib.Path(directory), bucket
    index = index or read_index(directory)
    counts = {
      self._directory / part / f"{bucket}{records_lib.SUFFIX}": held[bucket]
      for part, held in index["parts"].items()
      if held.get(bucket)
    }
    if not counts:
      raise errors.UserError(
        f"{self._directory / INDEX} is damaged: it has a bucket {bucket}, of"
        " which no part has records"
      )
    for path, expected in counts.items():
      try:
        count = len(grain_sources.ArrayRecordDataSource([str(path)]))
      except (OSError, RuntimeError) as e:
        raise errors.UserError(
          f"{path} is missing or damaged: {records_lib.one_line(e)}"
        ) from e
      if count != expected:
        raise errors.UserError(
          f"{path} has {count} records, expected {expected}"
        )
    self._source = grain_sources.ArrayRecordDataSource([str(p) for p in counts])

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: SupportsIndex) -> bytes:
    if not 0 <= int(index) < len(self):
      raise IndexError(f"{self} has no record {index}")
    try:
      return self._source[index]
    except RuntimeError as e:
      raise errors.UserError(
        f"record {index} of {self}: {records_lib.one_line(e)}"
      ) from e

  def __repr__(self) -> str:
    return f"Records({str(self._directory)!r}, {self._bucket!r})"


def sources(
  config: Mapping[str, Any],
  process: options_lib.Process | None = None,
  skipped: Any = None,
) -> list[buckets.BucketSource]:
  """Returns the buckets of a folder; their elements become float32 arrays.

  A clip comes with one of its captions, drawn as `caption_weights` says.

  Args:
    config: keys
      source: "latents".
      path: the folder.
      keys: names of arrays from `KEYS`; None reads all that each bucket has.
      text_tokens: tokens to which each text is padded with zeros; 512.
      latent_frames: how many latent frames to keep, from the first on; None
        keeps all. The first latent frame of "base" is an image: Wan's
        autoencoder encodes it without the later frames.
    process, skipped: not used, because no clip is left out.

  Raises:
    errors.UserError: for a bad config or a damaged folder; also when an element
      is read, for a damaged record or a text of more than `text_tokens`.
  """
  del process, skipped
  options = options_lib.checked(
    config,
    ("latents",),
    _REQUIRED,
    _DEFAULTS,
    positive=("text_tokens", "latent_frames"),
  )
  index = read_index(options["path"])
  keys = _keys(options, index)
  bucketed = []
  for bucket, about in index["buckets"].items():
    records = Records(options["path"], bucket, index)
    shapes = {key: about["shapes"][key] for key in keys}
    draw = _Draw(repr(records), shapes, options)
    bucketed.append(buckets.BucketSource(bucket, records, draw))
  return bucketed


def _keys(options, index) -> tuple[str, ...]:
  """Returns the names of the arrays to read, which every bucket must have."""
  held = [
    key
    for key in KEYS
    if all(key in about["shapes"] for about in index["buckets"].values())
  ]
  keys = tuple(held if options["keys"] is None else options["keys"])
  if missing := [key for key in keys if key not in held]:
    raise errors.UserError(
      f"{options['path']} has no {', '.join(missing)}, only {', '.join(held)}"
    )
  return keys


class _Draw(grain.transforms.RandomMap):
  """Turns a record into float32 arrays, with one of its captions."""

  def __init__(
    self, name: str, shapes: Mapping[str, Any], options: Mapping[str, Any]
  ):
    self._name, self._shapes = name, shapes
    self._tokens = options["text_tokens"]
    self._frames = options["latent_frames"]

  def random_map(self, element: bytes, rng: np.random.Generator):
    try:
      arrays, meta = decode(element, tuple(self._shapes))
      for key, shape in self._shapes.items():
        if key != "text" and [*arrays[key].shape] != shape:
          raise ValueError(f"{key} is {arrays[key].shape}, expected {shape}")
      if "text" in self._shapes:
        texts = arrays["text"]
        odds = caption_weights(len(texts), meta["scores"])
        chosen = texts[rng.choice(len(texts), p=odds)]
        arrays["text"] = padded(chosen, self._tokens)
      for key in _OVER_TIME:
        if key in arrays:
          arrays[key] = arrays[key][: self._frames]
      return {key: arrays[key].astype(np.float32) for key in self._shapes}
    except errors.UserError:
      raise
    except (ValueError, KeyError) as e:
      raise errors.UserError(
        f"a record of {self._name} is damaged: {records_lib.one_line(e)}"
      ) from e
