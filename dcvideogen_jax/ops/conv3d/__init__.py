"""Three-dimensional convolution, stride 1, channels last."""

from dcvideogen_jax.ops.conv3d.api import IMPLEMENTATIONS, choose, conv3d
from dcvideogen_jax.ops.conv3d.sharded import conv3d_sharded

__all__ = ["IMPLEMENTATIONS", "choose", "conv3d", "conv3d_sharded"]
