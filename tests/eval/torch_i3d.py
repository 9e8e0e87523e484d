"""I3D in PyTorch, an oracle with the names of piergiaj's `pytorch_i3d.py`.

Written from the description of the network; padding is TensorFlow's SAME.
"""

import torch
from torch import nn
from torch.nn import functional as F

# Widths of the branches 0; 1a, 1b; 2a, 2b; 3 of each block.
MIXED = {
  "Mixed_3b": (64, 96, 128, 16, 32, 32),
  "Mixed_3c": (128, 128, 192, 32, 96, 64),
  "Mixed_4b": (192, 96, 208, 16, 48, 64),
  "Mixed_4c": (160, 112, 224, 24, 64, 64),
  "Mixed_4d": (128, 128, 256, 24, 64, 64),
  "Mixed_4e": (112, 144, 288, 32, 64, 64),
  "Mixed_4f": (256, 160, 320, 32, 128, 128),
  "Mixed_5b": (256, 160, 320, 32, 128, 128),
  "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def pad(x, kernel, stride, value: float = 0.0):
  """Pads as TensorFlow's SAME: the odd zero goes to the end."""
  edges = []
  for size, k, s in zip(
    x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True
  ):
    total = max((-(-size // s) - 1) * s + k - size, 0)
    edges += [total // 2, total - total // 2]
  return F.pad(x, edges, value=value)


def pool(x, kernel, stride):
  return F.max_pool3d(pad(x, kernel, stride, float("-inf")), kernel, stride)


class Unit(nn.Module):
  def __init__(self, inputs, outputs, size, stride=1):
    super().__init__()
    self.size, self.stride = (size,) * 3, (stride,) * 3
    self.conv3d = nn.Conv3d(inputs, outputs, self.size, self.stride, bias=False)
    self.bn = nn.BatchNorm3d(outputs, eps=1e-3)

  def forward(self, x):
    return F.relu(self.bn(self.conv3d(pad(x, self.size, self.stride))))


class Mixed(nn.Module):
  def __init__(self, inputs, widths):
    super().__init__()
    w0, w1a, w1b, w2a, w2b, w3 = widths
    self.b0 = Unit(inputs, w0, 1)
    self.b1a, self.b1b = Unit(inputs, w1a, 1), Unit(w1a, w1b, 3)
    self.b2a, self.b2b = Unit(inputs, w2a, 1), Unit(w2a, w2b, 3)
    self.b3b = Unit(inputs, w3, 1)

  def forward(self, x):
    pooled = pool(x, (3, 3, 3), (1, 1, 1))
    branches = (
      self.b0(x),
      self.b1b(self.b1a(x)),
      self.b2b(self.b2a(x)),
      self.b3b(pooled),
    )
    return torch.cat(branches, dim=1)


class Logits(nn.Module):
  def __init__(self, inputs, classes):
    super().__init__()
    self.conv3d = nn.Conv3d(inputs, classes, 1)

  def forward(self, x):
    return self.conv3d(F.avg_pool3d(x, (2, 7, 7), 1))[..., 0, 0].mean(dim=2)


class I3D(nn.Module):
  def __init__(self, classes=400, divisor=1):
    super().__init__()
    self.Conv3d_1a_7x7 = Unit(3, 64 // divisor, 7, 2)
    self.Conv3d_2b_1x1 = Unit(64 // divisor, 64 // divisor, 1)
    self.Conv3d_2c_3x3 = Unit(64 // divisor, 192 // divisor, 3)
    channels = 192 // divisor
    for name, widths in MIXED.items():
      widths = tuple(w // divisor for w in widths)
      setattr(self, name, Mixed(channels, widths))
      channels = widths[0] + widths[2] + widths[4] + widths[5]
    self.logits = Logits(channels, classes)

  def forward(self, x):
    """Takes clips `b 3 t 224 224` in [-1, 1]."""
    x = pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
    x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = pool(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))
    x = self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))
    x = pool(self.Mixed_4f(self.Mixed_4e(x)), (2, 2, 2), (2, 2, 2))
    return self.logits(self.Mixed_5c(self.Mixed_5b(x)))
