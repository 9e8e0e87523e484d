"""The flag --output of the programs `evaluate ...`, and how it is written."""

import contextlib
import pathlib
from collections.abc import Iterator
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
    from dcvideogen_jax import provenance

    with files.atomic(output) as path:
      path.write_text(provenance.to_json(filled), encoding="utf-8")
