"""Where the parts of a pipeline lie when several devices share the work."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, sharding


class Layout(NamedTuple):
  """Devices, and rules for weights.

  All that is no weight (noise, latents, texts, images) lies whole on every
  device; the models split what they compute.

  Attributes:
    mesh: the devices.
    rules: as of `sharding.specs`; the names of leaves begin with that of their
      part, such as "transformer/params/...". Parts are "transformer",
      "text_encoder", "image_encoder" and "autoencoder".
  """

  mesh: Mesh
  rules: Sequence[sharding.Rule]

  @property
  def everywhere(self) -> NamedSharding:
    """The sharding of what lies whole on every device."""
    return NamedSharding(self.mesh, P())

  def shardings(self, part: str, variables: Any) -> Any:
    """Shardings for the variables, or their shapes, of a part.

    Raises:
      errors.UserError: if the rules do not fit.
    """
    shardings = sharding.shardings({part: variables}, self.mesh, self.rules)
    return shardings[part]

  def put(self, x: Any) -> jax.Array:
    """An array on every device; each process is to give the same."""
    return jax.device_put(sharding.to_host(x), self.everywhere)

  def check_batch(self, samples: int) -> None:
    """Raises UserError unless the samples can be shared evenly.

    Args:
      samples: that go through the transformer together; two for one with
        guidance, in one batch.
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
  """The layout on the first devices that there are; None for a single one.

  Args:
    sizes: as for `sharding.make_mesh`.
    rules: as of `Layout`.

  Raises:
    errors.UserError: if the sizes do not fit, or processes would have nothing
      to do.
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
  """Lets the models know of the layout's mesh, if there is one."""
  if layout is None:
    return contextlib.nullcontext()
  return jax.set_mesh(layout.mesh)
