"""Places the parts of a pipeline on several devices that share the work."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, sharding


class Layout(NamedTuple):
  """Devices, and sharding rules for weights.

  Everything except weights (noise, latents, texts, images) is replicated; the
  models shard what they compute.

  Attributes:
    mesh: the devices.
    rules: as for `sharding.specs`. The names of leaves begin with the name of
      their part, as in "transformer/params/...". The parts are "transformer",
      "text_encoder", "image_encoder" and "autoencoder".
  """

  mesh: Mesh
  rules: Sequence[sharding.Rule]

  @property
  def everywhere(self) -> NamedSharding:
    """The sharding of arrays that are replicated on every device."""
    return NamedSharding(self.mesh, P())

  def shardings(self, part: str, variables: Any) -> Any:
    """Returns shardings for the variables of a part, or for their shapes.

    Raises:
      errors.UserError: if the rules do not fit the variables.
    """
    shardings = sharding.shardings({part: variables}, self.mesh, self.rules)
    return shardings[part]

  def put(self, x: Any) -> jax.Array:
    """Replicates an array on every device; all processes must give the same."""
    return jax.device_put(sharding.to_host(x), self.everywhere)

  def check_batch(self, samples: int) -> None:
    """Checks that the devices can share samples evenly.

    Args:
      samples: the samples in one pass through the transformer. Batched guidance
        counts each sample twice.

    Raises:
      errors.UserError: if the devices that share samples do not divide them.
    """
    devices = sharding.batch_devices(self.mesh)
    if samples % devices:
      raise errors.UserError(
        f"mesh axes data and fsdp share samples between {devices} devices: "
        f"expected a multiple of that, found {samples} in a pass through the "
        "transformer (guidance in one batch doubles the prompts)"
      )


def layout(
  sizes: Mapping[str, int], rules: Sequence[sharding.Rule]
) -> Layout | None:
  """Builds the layout on the first devices; None for a single device.

  Args:
    sizes: of the mesh axes, as for `sharding.make_mesh`.
    rules: as for `Layout`.

  Raises:
    errors.UserError: if the sizes do not fit the devices, or if several
      processes would not use all of their devices.
  """
  devices = jax.devices()
  if -1 not in sizes.values():
    count = math.prod(sizes.values())
    if jax.process_count() > 1 and count != len(devices):
      raise errors.UserError(
        f"the mesh uses {count} of the {len(devices)} devices of "
        f"{jax.process_count()} processes: expected all of them"
      )
    devices = devices[: max(1, count)]
  mesh = sharding.make_mesh(sizes, devices)
  return None if mesh.size == 1 else Layout(mesh, rules)


def in_force(
  layout: Layout | None,
) -> contextlib.AbstractContextManager[Any]:
  """Returns a context with the layout's mesh set, or an empty one for None."""
  if layout is None:
    return contextlib.nullcontext()
  return jax.set_mesh(layout.mesh)


def placed(parts: Any, layout: Layout) -> Any:
  """Moves the variables of parts to where `loading.load` would have put them.

  Abstract variables (`jax.ShapeDtypeStruct`) only get their shardings.

  Args:
    parts: `loading.Parts`.
    layout: the devices.

  Raises:
    errors.UserError: if the layout's rules do not fit.
  """

  def put(x, where):
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.device_put(x, where)

  def move(name, part):
    where = layout.shardings(name, part.variables)
    return part.with_variables(jax.tree.map(put, part.variables, where))

  texts, images = parts.texts, parts.image_encoder
  return parts._replace(
    transformer=move("transformer", parts.transformer),
    space=move("autoencoder", parts.space),
    texts=texts and texts._replace(encoder=move("text_encoder", texts.encoder)),
    image_encoder=images and move("image_encoder", images),
  )
