"""Three-dimensional convolution, stride 1, channels last."""

from dcvideogen_jax.ops.conv3d.api import IMPLEMENTATIONS, choose, conv3d

__all__ = ["IMPLEMENTATIONS", "choose", "conv3d"]
