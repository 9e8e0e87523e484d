"""DC-AE-V in plain PyTorch, with which the benchmarks compare.

Written for the benchmarks: the layers of `models/dc_ae_v.py` with
`torch.nn.functional` and the official weight names, without any of the official
code. Float32, whole clips, inference only.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import einops

if TYPE_CHECKING:
  from torch import Tensor


class Peer:
  """The chunk_causal autoencoder.

  Args:
    weights: the official state dict; its tensors are not copied.
    config: the fields of the model, of which `widths` and `depths` are read,
      and `chunk_frames` (default 40), `spatial_factor` (32) and
      `temporal_factor` (4).
  """

  def __init__(
    self, weights: Mapping[str, "Tensor"], config: Mapping[str, Any]
  ):
    import torch

    self._functional = torch.nn.functional
    self._inference = torch.inference_mode
    self._weights = weights
    self._widths: Sequence[int] = config["widths"]
    self._depths: Sequence[int] = config["depths"]
    self._chunk = config.get("chunk_frames", 40)
    self._spatial = config.get("spatial_factor", 32)
    self._temporal = config.get("temporal_factor", 4)

  def encode(self, video: "Tensor") -> "Tensor":
    """Encodes `b 3 t h w` in [-1, 1] to latents `b c t h w`.

    Frames fill whole chunks; height and width are multiples of the spatial
    factor.
    """
    with self._inference():
      x = self._conv("encoder.project_in.conv.conv", video, self._chunk)
      x = _unshuffle(x, (1, 2, 2))
      for s in range(1, len(self._widths)):
        name = f"encoder.stages.{s}.op_list"
        for j in range(self._depths[s]):
          x = self._block(f"{name}.{j}.main", x, self._frames(s))
        if s + 1 < len(self._widths):
          name = f"{name}.{self._depths[s]}.main.conv.conv"
          y = _unshuffle(self._conv(name, x, self._chunk), self._factor(s))
          y += _average(_unshuffle(x, self._factor(s)), y.shape[1])
          x = y
      return self._conv("encoder.project_out.conv", x, self._frames(s))

  def decode(self, latents: "Tensor") -> "Tensor":
    """Decodes latents `b c t h w`, which fill whole chunks, to `b 3 t h w`."""
    coarsest = len(self._widths) - 1
    with self._inference():
      x = self._conv("decoder.project_in.conv", latents, self._frames(coarsest))
      for s in range(coarsest, 0, -1):
        name = f"decoder.stages.{s}.op_list"
        ups = int(s < coarsest)
        if ups:
          y = self._conv(f"{name}.0.main.conv.conv", x, self._frames(s + 1))
          y = _shuffle(y, self._factor(s))
          x = x.repeat_interleave(
            self._widths[s]
            * functools.reduce(int.__mul__, self._factor(s))
            // x.shape[1],
            dim=1,
          )
          y += _shuffle(x, self._factor(s))
          x = y
        for j in range(ups, ups + self._depths[s]):
          x = self._block(f"{name}.{j}.main", x, self._frames(s))
      x = self._norm("decoder.project_out.op_list.0", x)
      x = self._functional.silu(x, inplace=True)
      name = "decoder.project_out.op_list.2.conv.conv"
      return _shuffle(self._conv(name, x, self._chunk), (1, 2, 2))

  def _frames(self, stage):
    """Returns the number of frames of a chunk at a stage."""
    if stage == len(self._widths) - 1:
      return self._chunk // self._temporal
    return self._chunk

  def _factor(self, stage):
    """Returns the downsampling (t, h, w) from a stage to the next coarser."""
    if stage == len(self._widths) - 2:
      return (self._temporal, 1, 1)
    return (1, 2, 2)

  def _block(self, name, x, chunk):
    y = self._conv(f"{name}.conv1.conv", x, chunk)
    y = self._functional.silu(y, inplace=True)
    y = self._conv(f"{name}.conv2.conv", y, chunk)
    return self._norm(f"{name}.conv2.norm", y).add_(x)

  def _norm(self, name, x):
    """Normalises x in place, since no caller needs x afterwards."""
    scale, bias = (
      self._weights[f"{name}.{kind}"].reshape(-1, 1, 1, 1)
      for kind in ("weight", "bias")
    )
    x *= x.square().mean(1, keepdim=True).add_(1e-5).rsqrt_()
    return x.mul_(scale).add_(bias)

  def _conv(self, name, x, chunk):
    """Convolves each chunk, padded in time by its predecessor and zeros.

    The last frame of the previous chunk is in front of the chunk (zeros before
    the first one), and a frame of zeros is behind it.
    """
    kernel = self._weights[f"{name}.weight"]
    bias = self._weights.get(f"{name}.bias")
    conv3d, pad = self._functional.conv3d, self._functional.pad
    if x.shape[2] == chunk:
      return conv3d(x, kernel, bias, padding=1)
    x = pad(x, (0, 0, 0, 0, 1, 0)).unfold(2, chunk + 1, chunk)
    b = x.shape[0]
    x = einops.rearrange(x, "b c n h w t -> (b n) c t h w")
    y = conv3d(pad(x, (0, 0, 0, 0, 0, 1)), kernel, bias, padding=(0, 1, 1))
    return einops.rearrange(y, "(b n) c t h w -> b c (n t) h w", b=b)


def _unshuffle(x, factor):
  ft, fh, fw = factor
  return einops.rearrange(
    x,
    "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w",
    ft=ft,
    fh=fh,
    fw=fw,
  )


def _shuffle(x, factor):
  ft, fh, fw = factor
  return einops.rearrange(
    x,
    "b (c ft fh fw) t h w -> b c (t ft) (h fh) (w fw)",
    ft=ft,
    fh=fh,
    fw=fw,
  )


def _average(x, features):
  """Averages groups of consecutive channels down to `features` channels."""
  return x.unflatten(1, (features, -1)).mean(2)
