"""Checks the shapes and dtypes that signatures of the package promise.

`conftest` gives `check` to jaxtyping's import hook, which calls it for every
function and dataclass of the package. beartype then checks the arguments and
the result of each call, while jax traces too: a letter has one size in a call.
"""

from beartype import BeartypeConf, beartype

_NUMBERS = BeartypeConf(is_pep484_tower=True)  # An int where a float may be.


# They check what users pass, and tests pass wrong values to see the sentences.
_REFUSE = (
  "DCVideoGen.generate",
  "LatentSpace.condition",
  "StreamOptions.__init__",
  "VideoOptions.__init__",
  "prompts",
)


def check(function):
  """Checks hints that have a shape; other wrong values are given on purpose."""
  if function.__qualname__ in _REFUSE:
    return function
  function.__annotations__ = {
    name: hint
    for name, hint in function.__annotations__.items()
    if "jaxtyping." in repr(hint)
  }
  return beartype(function, conf=_NUMBERS)
