"""Watches what becomes of random keys: none may be used twice.

`jax.debug_key_reuse` sees a key that is drawn from twice; it does not see one
that is drawn from and then folded, or that two places make independently.
"""

import collections

import jax

_DRAWS = ("normal", "uniform", "randint", "bernoulli", "bits")


class Keys:
  """What each key was used for: "drawn", "split" or "folded"."""

  def __init__(self, monkeypatch):
    self.uses = collections.defaultdict(list)
    for name in (*_DRAWS, "split", "fold_in"):
      monkeypatch.setattr(jax.random, name, self._watched(name))

  def _watched(self, name):
    function = getattr(jax.random, name)
    what = {"split": "split", "fold_in": "folded"}.get(name, "drawn")

    def run(key, *args, **kwargs):
      self.use(key, what)
      return function(key, *args, **kwargs)

    return run

  def use(self, key, what):
    """Notes a use; those inside of compiled functions have to be told."""
    if not isinstance(key, jax.core.Tracer):
      typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
      data = jax.random.key_data(key) if typed else key
      self.uses[bytes(memoryview(jax.device_get(data)))].append(what)

  def reused(self):
    """The uses of each key that is used in two ways, or drawn from twice.

    What is split or folded again gives the same keys, which are watched.
    """
    return [
      uses
      for uses in self.uses.values()
      if len(set(uses)) > 1 or uses.count("drawn") > 1
    ]
