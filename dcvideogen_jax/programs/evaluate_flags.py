"""What the programs `evaluate ...` share: --output, and how sizes are read."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import common

OUTPUT = flags.DEFINE_string(
  "output", None, "JSON file to write the report to.", required=True
)


@contextlib.contextmanager
def report() -> Iterator[dict[str, Any]]:
  """Yields a dictionary to fill, and writes it to --output on leaving.

  One that is still empty is not written: other processes have clips left.

  Raises:
    errors.UserError: if --output cannot be written; raised on entering, before
      any work.
  """
  output = pathlib.Path(OUTPUT.value)
  if output.is_dir():
    raise errors.UserError(
      f"--output={output} is a directory, expected a JSON file"
    )
  with common.output_directory(output.parent):
    filled: dict[str, Any] = {}
    yield filled
    if not filled:
      return
    from dcvideogen_jax import provenance

    with files.atomic(output) as path:
      path.write_text(provenance.to_json(filled), encoding="utf-8")


def read_size(given: Sequence[str]) -> tuple[int, int, int]:
  """Reads frames, height and width, the words of a flag --size.

  Raises:
    errors.UserError: if they are not three whole numbers.
  """
  try:
    frames, height, width = (int(n) for n in given)
  except ValueError as e:
    raise errors.UserError(
      f"--size must be frames,height,width, found {','.join(given)}"
    ) from e
  return frames, height, width
