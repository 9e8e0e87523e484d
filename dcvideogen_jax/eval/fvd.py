"""FVD: the Fréchet distance of sets of clips, by the logits of I3D.

Follows DC-Gen `apps/metrics/fvd/fvd.py` (commit 562077c), which computes FVD as
StyleGAN-V does: frames of uint8, the short side resized to 224 pixels
bilinearly without smoothing, the centre cut out, levels in [-1, 1], the 400
logits of a whole clip; then the Fréchet distance of the means and covariances
(n - 1) of all clips. Differences: sums are kept as moments in float64 that can
be merged, and the trace of the square root is computed by singular values,
which stays exact where the covariances of few clips are singular.

FVD falls with the number of clips: state it, and compare at the same number.
"""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Float64, UInt8

from dcvideogen_jax import errors, files
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.eval import batches
from dcvideogen_jax.models import i3d


def windows(
  clip: UInt8[np.ndarray, "t h w 3"], length: int | None = None
) -> list[UInt8[np.ndarray, "u h w 3"]]:
  """Cuts a clip into windows that do not overlap, from its first frame.

  Args:
    clip: the frames.
    length: frames of a window; None for the whole clip. Frames at the end that
      do not fill a window are left out.

  Raises:
    errors.UserError: if the clip or a window is too short.
  """
  length = len(clip) if length is None else length
  if length < i3d.SHORTEST:
    raise errors.UserError(
      f"FVD needs at least {i3d.SHORTEST} frames of each clip, found {length}"
    )
  if len(clip) < length:
    raise errors.UserError(
      f"windows of {length} frames do not fit a clip of {len(clip)}"
    )
  starts = range(0, len(clip) - length + 1, length)
  return [clip[start : start + length] for start in starts]


def features(
  module: i3d.I3D,
  variables: Any,
  clips: Sequence[UInt8[Array, "t h w 3"]] | UInt8[Array, "n t h w 3"],
) -> Float64[np.ndarray, "n c"]:
  """Returns the logits of each clip.

  Each device that holds the variables takes one clip at a time.

  Args:
    module: the network.
    variables: its weights; see `networks.load`.
    clips: one or more of one shape, of at least `i3d.SHORTEST` frames.

  Raises:
    TypeError: if the frames are not uint8.
    errors.UserError: if the clips are too short or differ in shape.
  """
  shapes = {clip.shape for clip in clips}
  if len(shapes) != 1:
    raise errors.UserError(
      f"FVD takes clips of one shape at a time, found {sorted(shapes)}"
    )
  ((frames, height, width, _),) = shapes
  if any(clip.dtype != np.uint8 for clip in clips):
    raise TypeError(f"frames must be uint8, not {clips[0].dtype}")
  if frames < i3d.SHORTEST:
    raise errors.UserError(
      f"FVD needs at least {i3d.SHORTEST} frames of each clip, found {frames}"
    )
  devices = batches.devices_of(variables)
  compute = functools.partial(_features, module, variables)
  values = [
    batches.run(compute, (np.stack(clips[i : i + len(devices)]),), devices, 1)
    for i in range(0, len(clips), len(devices))
  ]
  return np.concatenate(values).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _features(module, variables, clips):
  return module.apply(variables, preprocess(clips))


def preprocess(
  clips: UInt8[Array, "n t h w 3"],
) -> Float[Array, "n t 224 224 3"]:
  """Resizes and cuts clips for I3D, in [-1, 1]."""
  n, t, h, w, c = clips.shape
  scale = i3d.SIZE / min(h, w)
  # As in the official code: the product of an exact fit may round up.
  size = (i3d.SIZE, math.ceil(w * scale))
  if h >= w:
    size = (math.ceil(h * scale), i3d.SIZE)
  x = clips.astype(jnp.float32) / 255
  if size != (h, w):
    x = jax.image.resize(x, (n, t, *size, c), "linear", antialias=False)
  top, left = ((side - i3d.SIZE) // 2 for side in size)
  x = x[:, :, top : top + i3d.SIZE, left : left + i3d.SIZE]
  return (x - 0.5) * 2


class Gaussian(Protocol):
  """What `distance` compares: `Moments`, or a `Reference` that was stored."""

  @property
  def mean(self) -> Float64[np.ndarray, " c"]:
    """The mean of the features."""

  @property
  def covariance(self) -> Float64[np.ndarray, "c c"]:
    """The covariance of the features."""


class Reference(NamedTuple):
  """The statistics of a set of clips, from a file.

  Attributes:
    mean: of the features.
    covariance: of the features.
    count: number of clips; None where the file does not say it.
  """

  mean: Float64[np.ndarray, " c"]
  covariance: Float64[np.ndarray, "c c"]
  count: int | None


class Moments(NamedTuple):
  """Sums over features, which can be merged.

  Attributes:
    count: number of features.
    mean: their mean.
    scatter: sum over features of the products of their deviations from the
      mean.
  """

  count: int
  mean: Float64[np.ndarray, " c"]
  scatter: Float64[np.ndarray, "c c"]

  @classmethod
  def empty(cls, width: int = i3d.CLASSES) -> "Moments":
    """Returns the moments of no features."""
    return cls(0, np.zeros(width), np.zeros((width, width)))

  @classmethod
  def of(cls, values: Float64[np.ndarray, "n c"]) -> "Moments":
    """Returns the moments of one or more features."""
    mean = values.mean(axis=0)
    deviations = values - mean
    return cls(len(values), mean, deviations.T @ deviations)

  def merge(self, other: "Moments") -> "Moments":
    """Returns the moments of the features of both.

    The means are subtracted before they are squared, so that no digits cancel
    (Chan, Golub and LeVeque 1983).
    """
    count = self.count + other.count
    if not count:
      return self
    difference = other.mean - self.mean
    weight = self.count * other.count / count
    return Moments(
      count,
      self.mean + difference * (other.count / count),
      self.scatter + other.scatter + weight * np.outer(difference, difference),
    )

  @property
  def covariance(self) -> Float64[np.ndarray, "c c"]:
    """The covariance, with n - 1.

    Raises:
      errors.UserError: if there are fewer than two features.
    """
    if self.count < 2:
      raise errors.UserError(
        f"FVD needs at least two clips on each side, found {self.count}"
      )
    return self.scatter / (self.count - 1)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the moments to an .npz file, which `load` and `reference` read.

    Raises:
      errors.UserError: if the file cannot be written.
    """
    with files.atomic(path) as temporary, temporary.open("wb") as file:
      np.savez(file, **self._asdict())

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> "Moments":
    """Reads moments that `save` wrote.

    Raises:
      errors.UserError: if the file cannot be read or holds no moments.
    """
    arrays = _arrays(path, ("count", "mean", "scatter"))
    return cls(int(arrays["count"]), arrays["mean"], arrays["scatter"])


def reference(path: str | os.PathLike[str]) -> Reference:
  """Reads the statistics of reference clips.

  Args:
    path: an .npz file that `Moments.save` or the official code wrote; that has
      "mu" and "sigma" and does not say the number of clips.

  Raises:
    errors.UserError: if the file cannot be read or holds no statistics.
  """
  arrays = _arrays(path, ("mu", "sigma"), ("count", "mean", "scatter"))
  if "mu" in arrays:
    return Reference(arrays["mu"], arrays["sigma"], None)
  moments = Moments(int(arrays["count"]), arrays["mean"], arrays["scatter"])
  return Reference(moments.mean, moments.covariance, moments.count)


def _arrays(path, *choices: tuple[str, ...]) -> dict[str, np.ndarray]:
  """Reads the arrays of the first set of names that the file has."""
  try:
    with np.load(path, allow_pickle=False) as file:
      for names in choices:
        if {*names} <= {*file.files}:
          found = {name: file[name].astype(np.float64) for name in names}
          *_, mean, square = found.values()
          if square.shape != (*mean.shape, *mean.shape) or mean.ndim != 1:
            raise ValueError("its mean and covariance do not fit")
          return found
  except OSError as e:
    raise errors.UserError(f"cannot read {path}: {e.strerror or e}") from e
  # A damaged archive raises errors of zipfile, zlib and numpy.
  except Exception as e:
    raise errors.UserError(f"{path} holds no statistics for FVD: {e}") from e
  names = " or ".join(", ".join(names) for names in choices)
  raise errors.UserError(
    f"{path} holds no statistics for FVD: expected {names}"
  )


def gather(moments: Moments) -> Moments:
  """Returns the moments of all processes that have joined.

  All of them call this together; a process that runs alone gets its own.
  """
  if jax.process_count() == 1:
    return moments
  packed = np.concatenate(
    [[moments.count], moments.mean, moments.scatter.ravel()]
  )
  # jax would round float64 to float32.
  bits = packed.astype(np.float64).view(np.uint32)
  rows = np.asarray(multihost_utils.process_allgather(bits)).view(np.float64)
  width = len(moments.mean)
  return functools.reduce(
    Moments.merge,
    (
      Moments(
        int(row[0]), row[1 : 1 + width], row[1 + width :].reshape(width, width)
      )
      for row in rows
    ),
  )


def distance(a: Gaussian, b: Gaussian) -> float:
  """Returns the Fréchet distance of two Gaussians.

  For covariances A = F F' and B = G G', the trace of the square root of A B is
  the sum of the singular values of F' G. This needs no square root of a matrix
  that is not symmetric, which is inexact where A B is singular.

  Args:
    a: moments or a stored reference.
    b: moments or a stored reference.

  Raises:
    errors.UserError: if one has fewer than two clips, or their features differ
      in number.
  """
  if a.mean.shape != b.mean.shape:
    raise errors.UserError(
      f"FVD compares features of one network, found {len(a.mean)} and"
      f" {len(b.mean)} of them"
    )
  first, second = a.covariance, b.covariance
  product = _factor(first).T @ _factor(second)
  root = np.linalg.svd(product, compute_uv=False).sum()
  means = np.square(a.mean - b.mean).sum()
  return float(means + np.trace(first) + np.trace(second) - 2 * root)


def _factor(covariance: np.ndarray) -> np.ndarray:
  """Returns F with F F' = covariance; what is rounding becomes zero."""
  values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
  smallest = np.finfo(np.float64).eps * len(values) * np.abs(values).max()
  values = np.where(values > smallest, values, 0.0)
  return vectors * np.sqrt(values)
