"""The array type that annotations name: what jax's functions take.

jax's own type is `jax.Array`, yet every function of jax takes numpy's arrays
too, and so does every function here whose annotation says `Array`. Tests check
the annotations as they run, shapes and dtypes included.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
  Array = jax.Array
else:
  Array = jax.Array | np.ndarray
