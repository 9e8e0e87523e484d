"""Writes the result of a training under the names of PyTorch.

  dcvideogen export --workdir=DIR --output=DIR/model
  dcvideogen export --workdir=DIR --output=DIR/lora --format=lora

`--workdir` is that of `dcvideogen train`, which may still be running. The
output is a directory. It holds a model that the programs here open; depending
on `--layout`, diffusers or Wan's own code open it too. After the first phase of
an adaptation it holds the patch embedding alone. With `--format=lora` it holds
the adapter that PEFT puts on the base model.
"""

from collections.abc import Sequence

from absl import flags

from dcvideogen_jax.programs import common

_DTYPES = ["float32", "bfloat16"]
_FORMATS = ["merged", "lora"]
_LAYOUTS = ["diffusers", "official", "original"]

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Directory of the training: the --workdir of `dcvideogen train`.",
  required=True,
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory to write the weights to.", required=True
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  _DTYPES,
  "dtype of the written weights. Unset: bfloat16 for DC-AE-V, else float32.",
)
_FORMAT = flags.DEFINE_enum(
  "format",
  "merged",
  _FORMATS,
  "merged writes the whole model, with low-rank updates added to its weights;"
  " lora writes the low-rank updates, with the other parameters that were"
  " trained.",
)
_LAYOUT = flags.DEFINE_enum(
  "layout",
  None,
  _LAYOUTS,
  "Whose names and files to write: those of diffusers, of Wan's own code"
  " (original) or of the official DC-VideoGen code (official). Unset: official"
  " for DC-AE-V, else diffusers.",
)
_FIELDS = flags.DEFINE_string(
  "fields",
  None,
  "Statistics of the latents to write into config.json, as JSON text or a .json"
  ' file: {"latent_scale": 0.72} for DC-AE-V, {"mean": [...], "std": [...]} for'
  " the Wan autoencoder. Unset: measured on the training's data, if its config"
  " says on how many batches.",
)


def main(argv: Sequence[str]) -> None:
  """Exports the newest checkpoint."""
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
