"""The sampling presets, which are a part of the package.

`--config=configs/sample.py:dc-t2v-14b,size=720p` is `--config=` and the same
after the colon. Copy this file to change what overrides cannot.
"""

from dcvideogen_jax.sample.presets import MODELS as MODELS
from dcvideogen_jax.sample.presets import SIZES as SIZES
from dcvideogen_jax.sample.presets import get_config as get_config
