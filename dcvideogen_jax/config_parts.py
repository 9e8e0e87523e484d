"""Parts of configs: the grammar of their argument, meshes, sharding rules."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from dcvideogen_jax import errors


def mesh(**sizes: int) -> dict[str, int]:
  """Returns the size of each mesh axis: 1 unless given; -1 is what remains."""
  axes = ("data", "fsdp", "tensor", "context", "spatial")
  return dict.fromkeys(axes, 1) | sizes


_IN = ".*/(q|k|v|k_img|v_img|linear_1)"
_OUT = ".*/(o|linear_2)"
_NORM = ".*/blocks/.*/(norm_q|norm_k|norm_k_img)"


def dit_sharding(*weights: str) -> tuple[tuple[str, Any], ...]:
  """Returns the sharding rules of a `models.wan_dit` and of its train state.

  In self-attention, cross-attention and the feed-forward, the mesh axis
  "tensor" shards the heads or the hidden features, of low-rank updates too.
  Leaves under blocks/ begin with an axis of layers.

  Args:
    *weights: mesh axes that shard all leaves in addition, where they divide
      them. Devices along these axes gather the weights of a layer when they
      compute it.
  """
  rest = "+".join(weights)
  w = f"{rest}?"
  return (
    ("frozen/encoders/.*", rest),
    (f".*/blocks{_IN}/kernel", (None, w, "tensor")),
    (f".*/blocks{_IN}/(bias|scale)", (None, "tensor")),
    (f".*/blocks{_OUT}/scale", (None, w)),
    (f".*/blocks{_IN}/a", (None, w, None)),
    (f".*/blocks{_IN}/b", (None, w, "tensor")),
    (f".*/blocks{_OUT}/kernel", (None, "tensor", w)),
    (f".*/blocks{_OUT}/a", (None, "tensor", w)),
    (f".*/blocks{_OUT}/b", (None, None, w)),
    (f"{_NORM}/scale", (None, "tensor")),
    (".*/(text|image|time)_embed/linear_1/kernel", (w, "tensor")),
    (".*/(text|image|time)_embed/linear_1/bias", ("tensor",)),
    (".*/(text|image|time)_embed/linear_2/kernel", ("tensor", w)),
    (".*", rest),
  )


# Rules for training. "context" shards the tokens of a sample and, like "fsdp",
# also the weights.
DIT_SHARDING = dit_sharding("fsdp", "context")


def sample_sharding(*weights: str) -> tuple[tuple[str, Any], ...]:
  """Returns the sharding rules of a pipeline; names begin with the part.

  Args:
    *weights: mesh axes that shard the transformer in addition to "tensor", as
      for `dit_sharding`. Without "context", the devices along that axis have
      copies of the weights.
  """
  return (
    ("(text|image)_encoder/.*", "+".join(mesh())),
    ("autoencoder/.*", "replicate"),
    *dit_sharding(*weights),
  )


SAMPLE_SHARDING = sample_sharding("fsdp")


def parse_arg(
  arg: str | None, choices: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """Parses what follows the colon in `--config=file.py:arg`.

  The argument is a comma-separated list of `key=value`; a bare `key` means
  `key=True`. The first item may be a bare value of the first key.

  Args:
    arg: such as "autoencoder,time=causal,runlocal"; None or "" for defaults.
    choices: key -> tuple of allowed values, the first of which is the default.
      A key with an empty tuple is a switch, False by default.

  Raises:
    errors.UserError: for an unknown key or value.
  """
  found = {
    key: allowed[0] if allowed else False for key, allowed in choices.items()
  }
  first = next(iter(choices))
  for i, item in enumerate(filter(None, (arg or "").split(","))):
    key, equals, value = (part.strip() for part in item.partition("="))
    if not equals and i == 0 and key not in choices:
      key, value = first, key
    if key not in choices:
      raise errors.UserError(
        f"the config's argument has the keys {', '.join(choices)}, "
        f"found {key!r}"
      )
    allowed = choices[key] or (True, False)
    values = {str(v).lower(): v for v in allowed}
    value = "true" if value == "" and not choices[key] else value
    if value.lower() not in values:
      raise errors.UserError(
        f"{key} must be one of {', '.join(map(str, allowed))}, found {value!r}"
      )
    found[key] = values[value.lower()]
  return ml_collections.ConfigDict(found)
