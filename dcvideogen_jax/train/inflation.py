"""Starts DC-AE-V from other weights: of an image DC-AE, or of another DC-AE-V.

The image weights are those of diffusers' `AutoencoderDC` (0.42.1). Their stages
are the stages of DC-AE-V without the coarsest one, which compresses time. Their
two-dimensional kernels become three-dimensional ones, in the centre tap alone
or spread over the three taps in equal parts. With the centre tap, no frame sees
another one, and a still video is reconstructed as the image was.

Only residual blocks fit. Blocks that the image model has not, or has as another
type, start as the identity; its shortcuts around the latents are added to the
kernels there.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import convert, errors, tree
from dcvideogen_jax.convert import sources
from dcvideogen_jax.models import dc_ae_v

TAPS = ("centre", "spread")
_FILES = ("diffusion_pytorch_model*",)

# Names in DC-AE-V -> names in `AutoencoderDC`. In the decoder the image model's
# coarsest stage has no upsampling, so that its blocks count from 0.
_NAMES = (
  (r"encoder/project_in/conv", "encoder.conv_in.conv"),
  (r"encoder/project_out", "encoder.conv_out"),
  (r"decoder/project_in", "decoder.conv_in"),
  (r"decoder/norm_out", "decoder.norm_out"),
  (r"decoder/project_out/conv", "decoder.conv_out.conv"),
  (r"encoder/stages_(\d+)/op_list_(\d+)", r"encoder.down_blocks.{}.{}"),
  (r"decoder/stages_(\d+)/op_list_(\d+)", r"decoder.up_blocks.{}.{}"),
)
_PARTS = {"conv1": ".conv1", "conv2": ".conv2", "conv2/norm": ".norm"}
_PARTS |= {"conv": ".conv", "": ""}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_LEAF = re.compile(
  r"(?P<layer>.*?(?:op_list_\d+|project_in(?:/conv)?|project_out(?:/conv)?|"
  r"norm_out))/?(?P<part>conv1|conv2/norm|conv2|conv)?/?(?P<leaf>\w+)"
)


class Row(NamedTuple):
  """Where a parameter comes from.

  Attributes:
    name: of the parameter.
    origin: name of the tensor that it is taken from; None for a new one.
  """

  name: str
  origin: str | None


def image_name(name: str, coarsest: int) -> str | None:
  """Returns the image model's name of a parameter; None if it has none.

  Args:
    name: of a parameter of DC-AE-V.
    coarsest: number of DC-AE-V's coarsest stage.
  """
  found = _LEAF.fullmatch(name)
  assert found is not None, name
  part, leaf = _PARTS[found["part"] or ""], _LEAVES[found["leaf"]]
  for pattern, target in _NAMES:
    if at := re.fullmatch(pattern, found["layer"]):
      stage, op = (int(n) for n in at.groups()) if at.groups() else (0, 0)
      if stage == coarsest:
        return None
      if name.startswith("decoder") and stage == coarsest - 1:
        op -= 1  # Op 0 is the step in time, which images have not.
      elif stage == coarsest - 1 and part == ".conv":
        return None
      return None if op < 0 else f"{target.format(stage, op)}{part}.{leaf}"
  return None


def from_images(
  source: sources.Source,
  module: dc_ae_v.DCAEV,
  params: Any,
  taps: str,
) -> tuple[Any, list[Row]]:
  """Starts a model from an image autoencoder's weights.

  Args:
    source: a directory or file in the layout of diffusers, or its tensors.
    module: the model.
    params: its random parameters. Those of new blocks become the identity.
    taps: one of `TAPS`.

  Returns:
    The parameters, and where each of them comes from.

  Raises:
    errors.UserError: if the source holds no such model, or no layer fits.
  """
  errors.choose("taps", taps, dict.fromkeys(TAPS))
  tensors = sources.open_source(source, _FILES)
  if "encoder.conv_out.weight" not in tensors:
    raise errors.UserError(
      f"{sources.told(source)} holds no AutoencoderDC of diffusers: expected "
      f"the tensor encoder.conv_out.weight, found {len(tensors)} others"
    )
  leaves, rows = tree.flatten(params), []
  coarsest = len(module.widths) - 1
  for name, leaf in leaves.items():
    origin, value = _origin(image_name(name, coarsest), tensors), None
    if origin is not None:
      value = _inflated(np.asarray(tensors[origin].read(), np.float32), taps)
    if value is None or value.shape != leaf.shape:
      value, origin = as_new(name, leaf), None
    leaves[name] = jnp.asarray(value, leaf.dtype)
    rows.append(Row(name, origin))
  if not any(row.origin for row in rows):
    raise errors.UserError(
      f"no layer of {sources.told(source)} fits the model's widths "
      f"{module.widths}"
    )
  _add_shortcuts(leaves, {row.name for row in rows if row.origin})
  return jax.tree.unflatten(jax.tree.structure(params), leaves.values()), rows


def _origin(name: str | None, tensors: Mapping[str, Any]) -> str | None:
  """Returns the tensor of a name; None if there is none that fits.

  A stage may have another number of blocks before its downsampling. Blocks with
  batch normalisation do not fit.
  """
  if name is None:
    return None
  block, _, part = name.rpartition(".norm.")
  if part and f"{block}.norm.running_mean" in tensors:
    return None
  if name.startswith("encoder.down_blocks") and ".conv." in name:
    pattern = re.sub(r"\.\d+\.conv\.", r"[.]\\d+[.]conv[.]", name)
    return next((n for n in tensors if re.fullmatch(pattern, n)), None)
  return name if name in tensors else None


def _inflated(value: np.ndarray, taps: str) -> np.ndarray:
  if value.ndim != 4:
    return value
  kernel = value.transpose(2, 3, 1, 0)
  zero = np.zeros_like(kernel)
  if taps == "centre":
    return np.stack([zero, kernel, zero])
  return np.stack([kernel / 3] * 3)


def as_new(name: str, leaf: jax.Array) -> jax.Array:
  """Makes a new layer the identity: a silent branch beside its shortcut.

  Layers without a shortcut, and first convolutions of blocks, stay random, so
  that the branch can learn.
  """
  silent = name.endswith("conv2/norm/scale") or re.fullmatch(
    r".*/op_list_\d+/conv/kernel", name
  )
  return jnp.zeros_like(leaf) if silent else leaf


def _add_shortcuts(leaves: dict[str, Any], taken: set[str]) -> None:
  """Adds the image model's shortcuts around the latents to the kernels there.

  The encoder's averages consecutive channels, the decoder's repeats them.
  """
  for name in ("encoder/project_out/kernel", "decoder/project_in/kernel"):
    if name not in taken:
      continue
    inputs, outputs = leaves[name].shape[-2:]
    if inputs >= outputs:
      of = np.arange(inputs) // (inputs // outputs)
      matrix = np.eye(outputs)[of] / (inputs // outputs)
    else:
      of = np.arange(outputs) // (outputs // inputs)
      matrix = np.eye(inputs)[:, of]
    leaves[name] = leaves[name].at[1, 1, 1].add(matrix)


def with_other_latents(
  source: str, module: dc_ae_v.DCAEV, params: Any
) -> tuple[Any, list[Row]]:
  """Starts a model from a DC-AE-V with another number of latent channels.

  The first channels are taken over. Further ones are new: the encoder's are
  random, and the decoder ignores them at first.

  Args:
    source: a DC-AE-V that `convert.load` reads.
    module: the model.
    params: its random parameters.

  Returns:
    The parameters, and where each of them comes from.

  Raises:
    errors.UserError: if the models differ in anything else.
  """
  _, variables = convert.load("dc_ae_v", source, dtype=jnp.float32)
  found, leaves = tree.flatten(variables["params"]), tree.flatten(params)
  rows = []
  for name, leaf in leaves.items():
    old = found.get(name)
    axes = {"encoder/project_out/kernel": 4, "encoder/project_out/bias": 0}
    axis = (axes | {"decoder/project_in/kernel": 3}).get(name)
    if axis is not None and old is not None:
      kept = min(old.shape[axis], leaf.shape[axis])
      at = (*[slice(None)] * axis, slice(kept))
      if name.startswith("decoder"):
        leaf = jnp.zeros_like(leaf)
      old = leaf.at[at].set(old[at])
    if old is None or old.shape != leaf.shape:
      raise errors.UserError(
        f"{source} differs from the model in more than latent channels: "
        f"{name} is {leaf.shape} in the model, "
        f"{None if old is None else old.shape} in the file"
      )
    leaves[name] = old
    rows.append(Row(name, name))
  return jax.tree.unflatten(jax.tree.structure(params), leaves.values()), rows


def table(rows: list[Row]) -> str:
  """Returns a Markdown table of what is taken and what is new, by layer."""
  layers: dict[str, list[Row]] = {}
  for row in rows:
    layer = re.sub(r"/(op_list_\d+|project_\w+|norm_out).*", r"/\1", row.name)
    layers.setdefault(layer, []).append(row)
  lines = ["| layer | from |", "|---|---|"]
  for layer, parts in layers.items():
    taken = (r.origin for r in parts if r.origin)
    origins = sorted({re.sub(r"[./]\w+$", "", origin) for origin in taken})
    lines.append(f"| {layer} | {', '.join(origins) or 'new'} |")
  return "\n".join(lines) + "\n"


STARTS: Mapping[str, Any] = {
  "inflate_centre": lambda source, module, params: from_images(
    source, module, params, "centre"
  ),
  "inflate_spread": lambda source, module, params: from_images(
    source, module, params, "spread"
  ),
  "other_latents": with_other_latents,
}
