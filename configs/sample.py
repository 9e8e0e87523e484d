"""The sampling presets of the package, as a config file.

`--config=configs/sample.py:dc-t2v-14b,size=720p` means the same as
`--config=dc-t2v-14b,size=720p`. For changes that `--config.KEY=VALUE` cannot
make, copy this file and change the result of `get_config`.
"""

from dcvideogen_jax.sample.presets import MODELS as MODELS
from dcvideogen_jax.sample.presets import SIZES as SIZES
from dcvideogen_jax.sample.presets import get_config as get_config
