"""Writes the result of a training under the names of PyTorch.

  dcvideogen export --workdir=DIR --output=DIR/model
  dcvideogen export --workdir=DIR --output=DIR/lora --format=lora

`--workdir` is that of `dcvideogen train`, which may still be running. A
directory is written: a model, which the programs here and, with its layout,
diffusers or Wan's own code open; of the first phase of an adaptation, the patch
embedding; with `--format=lora`, what PEFT puts on the base.
"""

from collections.abc import Sequence

from absl import flags

from dcvideogen_jax.programs import common

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the training.", required=True
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory to write.", required=True
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16"],
  "What weights are stored as. Unset: bfloat16 for DC-AE-V, else float32.",
)
_FORMAT = flags.DEFINE_enum(
  "format",
  "merged",
  ["merged", "lora"],
  "The whole model, or low-rank updates with what else was trained.",
)
_LAYOUT = flags.DEFINE_enum(
  "layout",
  None,
  ["diffusers", "original", "official"],
  "Names of whose weights. Unset: official for DC-AE-V, else diffusers.",
)
_FIELDS = flags.DEFINE_string(
  "fields",
  None,
  "JSON, or a .json file: what was measured of latents and is written into"
  ' config.json, such as {"latent_scale": 0.72} of DC-AE-V or {"mean": [...],'
  ' "std": [...]} of the Wan autoencoder.',
)


def main(argv: Sequence[str]) -> None:
  """Reads the newest checkpoint and writes what was asked for."""
  del argv
  from dcvideogen_jax.sample import model_names
  from dcvideogen_jax.train import export

  fields = _FIELDS.value and model_names.fields(_FIELDS.value, "--fields")
  with common.output_directory(_OUTPUT.value) as output:
    step = export.export(
      _WORKDIR.value,
      output,
      _DTYPE.value,
      format=_FORMAT.value,
      layout=_LAYOUT.value,
      fields=fields,
    )
  print(f"step {step}: {_OUTPUT.value}")
