"""Devices that this machine lacks: their names, links and times."""

import dataclasses
import itertools
import math
import types

import pytest
from jax.experimental import topologies

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.plan import hardware, hlo, roofline, tpus

V5P, V6E, TPU7X = (tpus.TPUS[name] for name in ("v5p", "v6e", "tpu7x"))


def asked(monkeypatch, answer):
  """Returns what jax is asked for; `answer` returns devices or raises."""
  calls = []

  def describe(**options):
    calls.append(options)
    return types.SimpleNamespace(devices=answer())

  monkeypatch.setattr(topologies, "get_topology_desc", describe)
  return calls


def test_a_slice_by_its_name(monkeypatch):
  calls = asked(monkeypatch, lambda: [*range(64)])
  target = hardware.find("v5p:4x4x4")
  assert target.chip is V5P and target.topology == (4, 4, 4)
  assert target.devices == tuple(range(64))
  assert calls[0]["platform"] == "tpu"
  assert calls[0]["topology_name"] == "v5p:4x4x4"
  asked(monkeypatch, lambda: [*range(4)])
  assert hardware.find("v4:2x2x1").chip.cores == "megacore"
  # Two devices on each chip.
  asked(monkeypatch, lambda: [*range(8)])
  assert len(hardware.find("tpu7x:2x2x1").devices) == 8


def test_code_of_gpus():
  found = {name: gpu.architecture for name, gpu in hardware.GPUS.items()}
  assert found == {
    "h100": "sm_90a",
    "h200": "sm_90a",
    "a100": "sm_80",
    "b200": "sm_100a",
    "l40s": "sm_89",
    "rtx4090": "sm_89",
    "rtx5090": "sm_120",
  }


def fail(message):
  raise RuntimeError(message)


@pytest.mark.parametrize(
  ("name", "message", "sentence"),
  [
    ("v5p:4x4", None, "v5p has 3 axes, such as v5p:4x4x4, found v5p:4x4"),
    ("v6e", None, "unknown target 'v6e': .* such as v5p:4x4x4"),
    ("v6e:4", None, "unknown target 'v6e:4'"),
    ("v6e:3x3", "INVALID_ARGUMENT: not divisible\nand", "there is no v6e:3x3"),
    ("v6e:2x4", "no libtpu found\nand", "requirements-tpu.txt in an"),
  ],
)
def test_one_sentence(monkeypatch, name, message, sentence):
  asked(monkeypatch, lambda: fail(message))
  with pytest.raises(errors.UserError, match=sentence) as e:
    hardware.find(name)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("chip", "topology", "chips", "links"),
  [
    # A whole axis of a cube is a ring, with links in both directions.
    (V5P, (4, 4, 4), [(0, y, 0) for y in range(4)], 2),
    (
      V5P,
      (4, 4, 4),
      [(x, y, z) for x in (0, 3) for y in range(4) for z in (1, 2)],
      4,
    ),
    (V5P, (4, 4, 8), [(0, 0, z) for z in range(8)], 2),
    (V5P, (4, 4, 4), [(0, 0, 0), (0, 1, 0)], 1),
    # Smaller slices have no rings.
    (V5P, (2, 2, 4), [(0, 0, z) for z in range(4)], 1),
    (V6E, (8, 8), [(x, y) for x in range(8) for y in range(8)], 2),
    (V6E, (16, 16), [(x, y) for x in range(16) for y in range(16)], 4),
    # The two devices of a chip share its links.
    (TPU7X, (4, 4, 4), [(0, y, 0) for y in range(4) for _ in range(2)], 2),
  ],
)
def test_rates(chip, topology, chips, links):
  assert chip.rate(topology, chips) == links * chip.link


def test_the_devices_of_a_chip_exchange_data_without_links():
  assert TPU7X.rate((4, 4, 4), [(1, 2, 3), (1, 2, 3)]) == 600e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """The attributes that jax reads to place a device in a mesh."""

  id: int
  coords: tuple[int, int, int]
  device_kind: str
  platform: str = "tpu"
  core_on_chip: int = 0
  process_index: int = 0


@pytest.mark.parametrize(
  ("kind", "topology", "sizes"),
  [
    ("TPU v5", (4, 4, 4), {"fsdp": 32, "context": 2}),
    ("TPU v5", (4, 4, 4), {"fsdp": 16, "tensor": 2, "context": 2}),
    ("TPU v6 lite", (8, 8, 1), {"fsdp": 16, "context": 4}),
  ],
)
def test_a_mesh_that_splits_an_axis_of_the_torus(kind, topology, sizes):
  places = itertools.product(*map(range, topology))
  devices = [Chip(i, xyz[::-1], kind) for i, xyz in enumerate(places)]
  mesh = sharding.make_mesh(sizes, devices)
  assert {k: n for k, n in mesh.shape.items() if n > 1} == sizes
  # Neighbours along "context" are linked.
  grid = mesh.devices.reshape(-1, mesh.shape["context"])
  for a, b in zip(grid[0], grid[0][1:], strict=False):
    apart = [abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)]
    assert sum(min(n, 4 - n) if n == 3 else n for n in apart) == 1


def target():
  devices = tuple(
    types.SimpleNamespace(coords=(x, y)) for y in range(4) for x in range(2)
  )
  return hardware.Target("v6e:2x4", V6E, devices, (2, 4))


@pytest.mark.parametrize(
  ("flops", "traffic", "overlaps", "waits"),
  [(3, 2, 1, 0), (1, 2, 0, 1), (1, 1, 4, 2), (0, 0, 0, 0)],
)
def test_time(flops, traffic, overlaps, waits):
  rows = [
    # Four chips along the second axis, and two along the first.
    hlo.Collective("all-gather", (0, 2, 4, 6), True, 1, overlaps * 100e9),
    hlo.Collective("all-to-all", (0, 1), False, 1, waits * 100e9),
  ]
  work = roofline.Work(flops * 918e12, 0, traffic * 1638e9, rows)
  found = roofline.estimate(target(), work)
  assert found == roofline.Estimate(flops, traffic, overlaps, waits)
  assert found.total == max(flops, traffic, overlaps) + waits


def test_devices_in_the_order_of_a_mesh():
  order = target().devices[::-1]
  assert roofline.rate(target(), (0, 1), order) == V6E.link
  assert roofline.rate(target(), (0, 3), order) == 2 * V6E.link


def test_one_device_waits_for_nobody():
  assert roofline.rate(target(), (3,)) == math.inf


def test_utilisation():
  work = roofline.Work(0, 459e12, 0)
  found = roofline.utilisation(target(), work, 2)
  assert found == pytest.approx(0.25)
