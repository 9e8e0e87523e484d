"""Another decoder of a model's latents: the fast one in the folder beside it.

Weights in `DIR` or `FILE.pt` have their fast decoder in `DIR_fast` or
`FILE_fast`, a folder that a training in the phase "fast" exports.
"""

import os
import pathlib
from typing import Any, NamedTuple

from dcvideogen_jax import convert, errors
from dcvideogen_jax.models import dc_ae_v
from dcvideogen_jax.sample import layouts, model_names

FAST = "fast"
# Fields that say which latents a decoder decodes. The scale is measured in each
# training, so it tells apart models of one shape.
_SAME = ("latent_channels", "spatial_factor", "temporal_factor", "time")
_SAME += ("chunk_frames", "latent_scale")


class Pair(NamedTuple):
  """An autoencoder with a decoder that may be another model's.

  Attributes:
    module: encodes.
    decoder: decodes; may be `module` itself.
    variables: the parameters of the encoder and of this decoder.
  """

  module: dc_ae_v.DCAEV
  decoder: dc_ae_v.DCAEV
  variables: dict[str, Any]


def find(model: str | os.PathLike[str], decoder: str) -> pathlib.Path:
  """Returns where a decoder lies.

  Args:
    model: the file or folder of an autoencoder.
    decoder: "fast", or the path of a decoder.

  Raises:
    errors.UserError: if it is not there; says which config trains it.
  """
  model = pathlib.Path(os.path.abspath(model))
  name = model.stem if model.is_file() else model.name
  beside = model.with_name(f"{name}_{FAST}")
  path = beside if decoder == FAST else pathlib.Path(decoder)
  if path.exists():
    return path
  module, _ = convert.load("dc_ae_v", model, only=lambda name: False)
  variant = model_names.variant("dc_ae_v", module)
  config = "configs/tiny.py:autoencoder"
  if variant in dc_ae_v.VARIANTS:
    config = f"configs/dc_ae_v.py:{variant}"
  raise errors.UserError(
    f"there is no decoder {path} for {model}: `dcvideogen train --config="
    f"{config},phase=fast --config.weights={model} --export={beside}` trains it"
  )


def locate(
  source: str | os.PathLike[str],
  task: str,
  autoencoder: str | os.PathLike[str] | None,
  image_encoder: str | os.PathLike[str] | None,
  decoder: str | None,
) -> layouts.Paths:
  """Finds all parts of a model, the decoder that is asked for among them.

  Args:
    source, task, autoencoder, image_encoder: as for `layouts.locate`.
    decoder: as for `find`; None for the model's own.

  Raises:
    errors.UserError: as `layouts.locate` and `find`; also for a decoder of a
      model without DC-AE-V.
  """
  paths = layouts.locate(
    source, task, autoencoder=autoencoder, image_encoder=image_encoder
  )
  if decoder is None:
    return paths
  if paths.dc_ae_v is None:
    raise errors.UserError(
      "another decoder takes a model with DC-AE-V, found Wan's autoencoder in "
      f"{paths.wan_vae}"
    )
  return paths._replace(decoder=find(paths.dc_ae_v, decoder))


def paired(
  module: dc_ae_v.DCAEV, decoder: dc_ae_v.DCAEV, path: object
) -> dc_ae_v.DCAEV:
  """Returns a decoder after checking that it decodes a model's latents.

  Args:
    module: the model.
    decoder: the decoder.
    path: where it lies, for the message.

  Raises:
    errors.UserError: if it decodes others.
  """
  for name in _SAME:
    expected, found = getattr(module, name), getattr(decoder, name)
    if expected != found:
      raise errors.UserError(
        f"{path} decodes the latents of another model: expected {name} "
        f"{expected}, found {found}"
      )
  return decoder


def load(
  model: str | os.PathLike[str],
  decoder: str | None,
  config: Any = None,
  dtype: Any = None,
  sharding: Any = None,
) -> Pair:
  """Loads an autoencoder with the decoder that is asked for.

  Args:
    model: the file or folder of the autoencoder.
    decoder: as for `find`; None for the model's own.
    config, dtype, sharding: as for `convert.load`.

  Raises:
    errors.UserError: as `convert.load`, `find` and `paired`.
  """
  options = {"dtype": dtype, "sharding": sharding}
  if decoder is None:
    module, variables = convert.load("dc_ae_v", model, config, **options)
    return Pair(module, module, variables)
  path = find(model, decoder)
  module, half = convert.load(
    "dc_ae_v", model, config, **options, only=in_encoder
  )
  other, more = convert.load("dc_ae_v_decoder", path, **options)
  params = {**half["params"], **more["params"]}
  return Pair(module, paired(module, other, path), {"params": params})


def in_encoder(name: str) -> bool:
  """Returns whether a parameter of DC-AE-V is its encoder's."""
  return name.startswith("encoder/")


def in_decoder(name: str) -> bool:
  """Returns whether a parameter of DC-AE-V is its decoder's."""
  return name.startswith("decoder/")
