"""How much faster DC-VideoGen is than Wan: what a roofline says, and the paper.

Of the transformers with 1.3B parameters alone, in bfloat16 on one device, 50
guided steps; arXiv 2509.25182 measures them on an H100.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcvideogen_jax import flops, sharding
from dcvideogen_jax.data import tokenize
from dcvideogen_jax.plan import compiled, hardware, roofline, sampling
from dcvideogen_jax.sample import loading, placement, sizes

STEPS = 50
BASE, DEEP = "wan2.1-t2v-1.3b", "dc-wan2.1-t2v-1.3b"


class Case(NamedTuple):
  """A video's size, and the paper's minutes with Wan and with DC-VideoGen."""

  name: str
  size: sizes.Size
  base: float
  deep: float


CASES = (
  Case("480p", sizes.Size(80, 480, 832), 1.49, 0.24),
  Case("720p", sizes.Size(80, 704, 1280), 5.76, 0.70),
  Case("1080p", sizes.Size(80, 1088, 1920), 25.46, 2.27),
  Case("2160p", sizes.Size(80, 2176, 3840), 375.12, 25.41),
  Case("160 frames", sizes.Size(160, 704, 1280), 20.18, 1.99),
  Case("320 frames", sizes.Size(320, 704, 1280), 75.77, 6.03),
  Case("640 frames", sizes.Size(640, 704, 1280), 296.30, 20.86),
)


class Row(NamedTuple):
  """A case, and the least minutes that a roofline allows."""

  case: Case
  base: float
  deep: float

  @property
  def predicted(self) -> float:
    return self.base / self.deep

  @property
  def measured(self) -> float:
    return self.case.base / self.case.deep


def rows(target: hardware.Target) -> list[Row]:
  """A row for each of `CASES`, on one device."""
  return [
    Row(case, *(_minutes(name, case.size, target) for name in (BASE, DEEP)))
    for case in CASES
  ]


def _minutes(variant: str, size: sizes.Size, target: hardware.Target) -> float:
  mesh = sharding.make_mesh({}, target.devices[:1])
  layout = placement.Layout(mesh, ((".*", "replicate"),))
  parts = loading.placed(sampling.parts(variant, jnp.bfloat16), layout)
  shape = sampling.latent_shape(parts, size)
  width = parts.transformer.module.text_width
  text = jax.ShapeDtypeStruct((1, tokenize.LENGTH, width), jnp.bfloat16)
  traced, arguments, passes = sampling.trace_step(
    parts, shape, {"text": text}, True, layout
  )
  work = flops.count(traced.jaxpr.jaxpr)
  # At the least: weights, and what goes in and out.
  moved = passes * compiled.size(parts.transformer.variables)
  moved += compiled.size(arguments)
  step = roofline.estimate(target, roofline.Work(work, work, moved))
  return STEPS * step.total / 60
