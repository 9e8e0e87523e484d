"""PyTorch weights into JAX and back: `load`, `to_torch`, `save`."""

from dcvideogen_jax.convert.api import KINDS as KINDS
from dcvideogen_jax.convert.api import config_of as config_of
from dcvideogen_jax.convert.api import load as load
from dcvideogen_jax.convert.api import save as save
from dcvideogen_jax.convert.api import to_torch as to_torch
