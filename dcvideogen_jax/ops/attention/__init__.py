"""Attention: softmax(q k' / sqrt(e)) v, in memory linear in the tokens."""

from dcvideogen_jax.ops.attention.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from dcvideogen_jax.ops.attention.api import Unsupported as Unsupported
from dcvideogen_jax.ops.attention.api import attention as attention
from dcvideogen_jax.ops.attention.api import require as require
from dcvideogen_jax.ops.attention.masks import BlockCausal as BlockCausal
from dcvideogen_jax.ops.attention.masks import Mask as Mask
from dcvideogen_jax.ops.attention.masks import TeacherForcing as TeacherForcing
from dcvideogen_jax.ops.attention.mesh import (
  sharded_attention as sharded_attention,
)
