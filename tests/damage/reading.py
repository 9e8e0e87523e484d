"""What can be damaged, and what has to notice."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Changes of weights that make another, right input: a dtype of as many bytes,
# two tensors of one shape exchanged; in the files of PyTorch what is inside a
# member of the archive, and strides and offsets that stay inside.
WEIGHTS = (r"dtype of .* is '(F16|BF16|I32|F32)'", "are swapped", " is as ")
MEMBERS = (r"data/\d+: (flip|flips|zeros|noise|exchange) ", r"BININT.* is \d+$")
# Fields that are left out have their default.
MISSING = ("is (missing|called)",)


class Input(NamedTuple):
  """A file among those that something reads.

  Attributes:
    name: for people, and the same in every run.
    target: pattern of the files, in the directory, of which one is damaged.
    form: of these files, a key of `damage.FORMS`.
    make: writes the whole directory, always the same.
    read: reads the directory; gives arrays and plain values by name. What it
      gives for a damaged directory is compared with that for the whole one.
    blind: what the format has no means to notice when bytes are damaged:
      "nothing", as checksums see to that; "values", such as those of weights
      and pixels, while names and shapes have to stay; or "all", as of texts.
    free: patterns of descriptions of changed fields (see `damage.Damage`) that
      are another, right input.
    writes: whether `read` also writes, as what goes on with a folder does.
  """

  name: str
  target: str
  form: str
  make: Callable[[pathlib.Path], None]
  read: Callable[[pathlib.Path], Mapping[str, Any]]
  blind: str = "nothing"
  free: tuple[str, ...] = ()
  writes: bool = False
