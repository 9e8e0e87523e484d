"""Converts weights between the official PyTorch layouts and this project's.

  python -m launch.convert --source=dc-ae-v-f32t4c32-1.0.pt --output=f32t4c32
  python -m launch.convert --source=f32t4c32 --output=again.pt

A directory gets config.json and model.safetensors, which holds the official
names and layouts too. A `.pt` is written as the official loader reads it.
Nothing is lost either way unless `--dtype` asks for it.
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags

from dcvideogen_jax import convert, errors, files
from launch import _model, _program

_KIND = flags.DEFINE_enum(
  "kind", "dc_ae_v", sorted(convert.KINDS), "Which model."
)
_SOURCE = flags.DEFINE_string(
  "source", None, ".pt, .pth, .safetensors or a directory.", required=True
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "A directory, or a .pt or .safetensors file.", required=True
)
_TO = flags.DEFINE_enum(
  "to",
  None,
  ["jax", "torch"],
  "jax writes a directory, torch a file. Unset: as --output is named.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16"], "Of the result. Unset: unchanged."
)
_CONFIG = flags.DEFINE_string("config", None, _model.CONFIG_HELP)

_FILE_SUFFIXES = (".pt", ".pth", ".safetensors")


def main(argv: Sequence[str]) -> None:
  """Reads, checks, reports and writes the weights."""
  del argv
  output = pathlib.Path(_OUTPUT.value)
  _check_target(output, _TO.value)
  source = _model.weights(_SOURCE.value)
  module, variables = convert.load(
    _KIND.value,
    source,
    config=_model.config(_CONFIG.value),
    dtype=_DTYPE.value and jnp.dtype(_DTYPE.value),
  )
  leaves = jax.tree.leaves(variables)
  dtypes = sorted({leaf.dtype.name for leaf in leaves})
  print(
    f"{source}: {_KIND.value}, {_model.variant(_KIND.value, module)},"
    f" {len(leaves)} tensors,"
    f" {sum(leaf.size for leaf in leaves):,} parameters, {'/'.join(dtypes)}"
  )
  is_file = output.suffix in _FILE_SUFFIXES
  with _program.output_directory(output.parent if is_file else output):
    try:
      if is_file:
        _write_file(output, convert.to_torch(_KIND.value, module, variables))
      else:
        convert.save(output, _KIND.value, module, variables)
        output = output / "model.safetensors"
    except safetensors.SafetensorError as e:  # Such as a full disk.
      raise errors.UserError(f"cannot write {output}: {e}") from e
  print(f"wrote {output} ({_model.size_of(output)})")


def _check_target(output: pathlib.Path, to: str | None) -> None:
  """Raises UserError, before any work, if `--to` and `--output` disagree."""
  is_file = output.suffix in _FILE_SUFFIXES
  if to == "jax" and is_file:
    raise errors.UserError(
      f"--to=jax writes a directory, but --output={output} names a file"
    )
  if to == "torch" and not is_file:
    raise errors.UserError(
      f"--to=torch writes a file: expected --output to end in one of"
      f" {', '.join(_FILE_SUFFIXES)}, found {output}"
    )
  if is_file and output.is_dir():
    raise errors.UserError(f"--output={output} is a directory")
  if not is_file and output.is_file():
    raise errors.UserError(f"--output={output} is a file, not a directory")


def _write_file(
  output: pathlib.Path, state_dict: dict[str, np.ndarray]
) -> None:
  with files.atomic(output) as path:
    if output.suffix == ".safetensors":
      safetensors.numpy.save_file(state_dict, path, {"format": "pt"})
    else:
      _save_pt(path, state_dict)


def _save_pt(path: pathlib.Path, state_dict: dict[str, np.ndarray]) -> None:
  """Writes both keys that the official loader knows; the data is stored once.

  Raises:
    errors.UserError: if torch is not installed.
  """
  try:
    import torch
  except ImportError as e:
    raise errors.UserError(
      "writing a .pt needs PyTorch, which is not installed: run"
      " `pip install torch`, or give --output a name in .safetensors"
    ) from e
  tensors = {name: _to_tensor(torch, x) for name, x in state_dict.items()}
  checkpoint = {
    "model_state_dict": tensors,
    "ema_model_state_dict": {"ema": tensors},
  }
  try:
    with path.open("wb") as file:
      torch.save(checkpoint, file)
  except RuntimeError as e:  # About its own state: the disk's error is hidden.
    raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def _to_tensor(torch, x: np.ndarray):
  x = x if x.flags.writeable else x.copy()  # torch warns of the others.
  if x.dtype == jnp.bfloat16:  # numpy's is unknown to torch, its bits are not.
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(x)


if __name__ == "__main__":
  _program.run(main)
