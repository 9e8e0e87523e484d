"""Converts PyTorch weights to JAX and back."""

from dcvideogen_jax.convert.api import KINDS as KINDS
from dcvideogen_jax.convert.api import config_of as config_of
from dcvideogen_jax.convert.api import load as load
from dcvideogen_jax.convert.api import load_lora as load_lora
from dcvideogen_jax.convert.api import load_part as load_part
from dcvideogen_jax.convert.api import to_tensors as to_tensors
from dcvideogen_jax.convert.api import to_torch as to_torch
from dcvideogen_jax.convert.api import with_lora as with_lora
from dcvideogen_jax.convert.lora import Lora as Lora
from dcvideogen_jax.convert.lora import add as add
from dcvideogen_jax.convert.lora import from_collection as from_collection
from dcvideogen_jax.convert.lora import merge as merge
from dcvideogen_jax.convert.lora_writing import save_adapter as save_adapter
from dcvideogen_jax.convert.rounding import WEIGHTS as WEIGHTS
from dcvideogen_jax.convert.rounding import host as host
from dcvideogen_jax.convert.rounding import in_eight_bits as in_eight_bits
from dcvideogen_jax.convert.writing import finite as finite
from dcvideogen_jax.convert.writing import save as save
from dcvideogen_jax.convert.writing import write_file as write_file
from dcvideogen_jax.convert.writing import (
  write_safetensors as write_safetensors,
)
