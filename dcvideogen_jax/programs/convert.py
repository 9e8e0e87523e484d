"""Converts weights between libraries' layouts and this project's.

  dcvideogen convert --source=dc-ae-v-f32t4c32-1.0.pt --output=f32t4c32
  dcvideogen convert --kind=wan_dit --source=Wan2.1-T2V-1.3B \\
    --to=diffusers --output=transformer
  dcvideogen convert --kind=wan_dit --source=transformer \\
    --lora=style.safetensors,0.8 --lora=speed.safetensors --output=merged

The layout of the source is recognised from the names of its tensors. An output
directory gets config.json and safetensors files. With `--to=diffusers`,
`transformers` or `original` the named library opens it; with `--to=jax`, also
under PyTorch names, the programs here open it without further flags. A `.pt`
file is written as the official DC-VideoGen code reads it. Conversion is
lossless unless `--dtype` asks for another precision. Beside weights for
diffusers there is a model card, README.md, with the licence that the source's
card says, or that of --license.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

import dcvideogen_jax
from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import common

_KINDS = [
  "clip_vision",
  "dc_ae_v",
  "dc_ae_v_decoder",
  "umt5",
  "wan_dit",
  "wan_vae",
]
_LAYOUTS = [
  "diffusers",
  "official",
  "original",
  "transformers",
  "transformers5",
]

_KIND = flags.DEFINE_enum(
  "kind",
  "dc_ae_v",
  _KINDS,
  "Model to convert: the autoencoder DC-AE-V, or a decoder that was trained for"
  " one (dc_ae_v_decoder); Wan's transformer (wan_dit) or"
  " autoencoder (wan_vae), or the encoders of text (umt5) and of images"
  " (clip_vision).",
)
_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "Weights to read: a .safetensors, .gguf, .pt, .pth, .bin or .ckpt file, an"
  " .index.json, or a directory with such files; or tiny, the DC-AE-V that"
  " ships.",
  required=True,
)
_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "Directory to write, or a .pt, .pth or .safetensors file.",
  required=True,
)
_TO = flags.DEFINE_enum(
  "to",
  None,
  ["jax", "torch", *_LAYOUTS],
  "Layout to write. jax is a directory for the programs here, torch a single"
  " file; the others are the names and files that the named library or the"
  " authors' own code (official, original) opens. Unset: torch if --output is"
  " a file, else jax.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16"],
  "dtype of the written weights. Unset: that of the source.",
)
_WEIGHTS = flags.DEFINE_enum(
  "weights",
  None,
  ["int8", "float8", "bfloat16"],
  "Kernels in the blocks of wan_dit or umt5: in eight bits with a scale per"
  " output channel, or bfloat16 for kernels like the other weights. Unset: that"
  " of the source. Eight bits are written for the programs here (--to=jax).",
)
_CONFIG = flags.DEFINE_string("config", None, common.CONFIG_HELP)
_LORA = flags.DEFINE_multi_string(
  "lora",
  [],
  "LoRA or other adapter to merge into the weights: PATH, PATH,SCALE or"
  " PATH,SCALE,skip=PATTERN, with a scale of 1 unless given. Tensors with names"
  " that contain the regular expression PATTERN are left out; skip=interface"
  " leaves out the patch embedding and the head. The names of PEFT, diffusers,"
  " Wan, ComfyUI, kohya, musubi, LyCORIS and DC-VideoGen's trainer are known;"
  " adapters of a kind that is not read are refused. Several files add up",
)
_SHARD_GB = flags.DEFINE_float(
  "shard_gb",
  10.0,
  "Largest size of a weights file in GB (1e9 bytes), where --to names a"
  " library's layout; larger models are split into several files.",
  1e-6,
)

_LICENSE = flags.DEFINE_string(
  "license",
  None,
  "Licence for the model card that --to=diffusers writes, such as apache-2.0."
  " Unset: that of the card beside the source, if it says one.",
)

_FILE_SUFFIXES = (".pt", ".pth", ".safetensors")
# Suffixes of weights files that this program cannot write. --output with one
# of them is refused rather than taken for a directory.
_OTHER_SUFFIXES = (".bin", ".ckpt", ".gguf", ".sft")


def main(argv: Sequence[str]) -> None:
  """Reads, checks, reports and writes the weights."""
  del argv
  import jax
  import jax.numpy as jnp
  import tqdm

  from dcvideogen_jax import convert
  from dcvideogen_jax.sample import model_names

  kind, output = _KIND.value, pathlib.Path(_OUTPUT.value)
  _check_target(output, _TO.value)
  is_file = output.suffix in _FILE_SUFFIXES
  layout = _layout(kind, _TO.value)
  if layout is None or is_file:
    common.refuse_flags(["shard_gb"], "goes with the layout of a library only")
  has_card = layout == "diffusers" and not is_file
  if not has_card:
    common.refuse_flags(["license"], "goes with --to=diffusers only")
  loras = [model_names.lora(text) for text in _LORA.value]
  source = model_names.weights(_SOURCE.value)
  eight = _WEIGHTS.value in ("int8", "float8")
  if eight and (is_file or layout):
    raise errors.UserError(
      f"--weights={_WEIGHTS.value} is only written as a directory for the"
      f" programs here: expected --to=jax, found --output={output}"
      f" --to={_TO.value}"
    )
  # Adapters are merged before the kernels are rounded.
  rounds = loras and eight
  module, variables = convert.load(
    kind,
    source,
    config=model_names.config(_CONFIG.value),
    dtype=_DTYPE.value and jnp.dtype(_DTYPE.value),
    weights=None if rounds else _WEIGHTS.value,
  )
  leaves = jax.tree.leaves(variables)
  dtypes = sorted({leaf.dtype.name for leaf in leaves})
  print(
    f"{source}: {kind}, {model_names.variant(kind, module)},"
    f" {len(convert.to_tensors(kind, module, variables, layout))} tensors,"
    f" {sum(leaf.size for leaf in leaves):,} parameters, {'/'.join(dtypes)}"
  )
  if loras:
    variables = model_names.merge_loras(kind, module, variables, loras)
  if rounds:
    module, variables = convert.in_eight_bits(
      kind, module, variables, _WEIGHTS.value
    )
  with common.output_directory(output.parent if is_file else output):
    if is_file:
      convert.write_file(output, kind, module, variables, layout)
      written = [output]
    else:
      written = convert.save(
        output,
        kind,
        module,
        variables,
        layout=layout,
        shard_size=layout and int(_SHARD_GB.value * 1e9),
      )
      if has_card:
        _write_card(output, module, variables, source, written)
  for path in written:
    if path.suffix in _FILE_SUFFIXES:
      size = tqdm.tqdm.format_sizeof(path.stat().st_size, "B")
      print(f"wrote {path} ({size})")


def _write_card(
  output: pathlib.Path,
  module: Any,
  variables: Any,
  source: pathlib.Path,
  written: Sequence[pathlib.Path],
) -> None:
  """Writes README.md into `output`, unless there is one."""
  import jax

  from dcvideogen_jax import convert
  from dcvideogen_jax.convert import cards
  from dcvideogen_jax.sample import model_names

  path, kind = output / cards.NAME, _KIND.value
  if path.exists():
    print(f"kept {path}, so that no model card was written")
    return
  leaves = jax.tree.leaves(variables)
  terms = cards.licence(source, _LICENSE.value)
  text = cards.card(
    kind=kind,
    variant=model_names.variant(kind, module),
    parameters=sum(leaf.size for leaf in leaves),
    tensors=len(convert.to_tensors(kind, module, variables, "diffusers")),
    dtypes=sorted({leaf.dtype.name for leaf in leaves}),
    files={
      x.name: x.stat().st_size for x in written if x.suffix in _FILE_SUFFIXES
    },
    source=source,
    command=shlex.join(["dcvideogen", "convert", *sys.argv[1:]]),
    version=dcvideogen_jax.__version__,
    adapters=_LORA.value,
    terms=terms,
  )
  with files.atomic(path) as new:
    new.write_text(text, encoding="utf-8")
  if terms is None:
    print(f"{path} says no licence, as the source does not: see --license")


def _check_target(output: pathlib.Path, to: str | None) -> None:
  """Raises UserError if `--to` and `--output` disagree, before any work."""
  is_file = output.suffix in _FILE_SUFFIXES
  if output.suffix in _OTHER_SUFFIXES:
    raise errors.UserError(
      f"--output={output} names a file of a kind that is not written: expected"
      f" a directory or one of {', '.join(_FILE_SUFFIXES)}"
    )
  if to not in (None, "torch") and is_file and to not in _LAYOUTS:
    raise errors.UserError(
      f"--to={to} writes a directory, but --output={output} names a file"
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


def _layout(kind: str, to: str | None) -> str | None:
  """Returns the layout that `--to` names; None for jax, torch and no --to."""
  if to in (None, "jax", "torch"):
    return None
  from dcvideogen_jax import convert

  if to not in convert.KINDS[kind].layouts:
    raise errors.UserError(
      f"--to={to} is no layout of {kind}: expected jax, torch or one of"
      f" {', '.join(convert.KINDS[kind].layouts)}"
    )
  return to
