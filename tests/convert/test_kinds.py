"""Properties of every kind and layout at full size, checked on shapes alone."""

import math

import numpy as np
import pytest

from dcvideogen_jax import convert, tree
from dcvideogen_jax.convert import matching, naming, sources
from tests.convert import checkpoints

# Parameters of the released models, counted in PyTorch.
COUNTS = {
  ("wan_dit", "wan2.1-t2v-1.3b"): 1_418_996_800,
  ("wan_dit", "wan2.1-t2v-14b"): 14_288_491_584,
  ("wan_dit", "wan2.1-i2v-14b"): 16_394_878_784,
  ("wan_dit", "dc-wan2.1-t2v-1.3b"): 1_418_898_464,
  ("wan_dit", "dc-wan2.1-t2v-14b"): 14_288_163_872,
  ("wan_dit", "dc-wan2.1-i2v-14b"): 16_394_325_792,
  ("wan_vae", "wan2.1"): 126_892_531,
  ("umt5", "umt5_xxl"): 5_680_910_336,
  ("clip_vision", "vit_h_14"): 630_766_080,
}
KINDS = [
  (kind, layout)
  for kind in convert.KINDS
  for layout in convert.KINDS[kind].layouts
]


@pytest.mark.parametrize(("kind", "variant"), COUNTS)
def test_parameters_are_counted_as_in_pytorch(kind, variant):
  fields = convert.KINDS[kind].variants[variant]
  for layout in convert.KINDS[kind].layouts:
    shapes = checkpoints.shapes(kind, fields, layout)
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count == COUNTS[kind, variant]


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_names_are_one_to_one_and_recognised(kind, layout):
  rules = convert.KINDS[kind].layouts[layout]
  for fields in [*convert.KINDS[kind].variants.values()][:1]:
    module = convert.KINDS[kind].build(fields)
    leaves = tree.shapes(matching.parameters(kind, module))
    places = naming.places(rules, leaves)
    assert not naming.unknown(rules, leaves)
    assert len({place.torch for place in places}) == len(places)
    tensors = {
      place.torch: sources.Tensor(
        place.torch_shape(leaves[place.jax]), np.dtype(np.float32), None
      )
      for place in places
    }
    assert naming.jax_shapes(rules, tensors) == leaves
    found = matching.find_config(kind, {}, None, tensors)
    assert convert.KINDS[kind].build(found) == module
