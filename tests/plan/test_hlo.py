"""Traffic, collectives and FLOPs of compiled programs, from their text."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, flops, sharding
from dcvideogen_jax.plan import hlo, hlo_flops, replica_groups


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("replica_groups={{2,3},{0,1}}, x=1", (2, 3)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
    ("source_target_pairs={{1,1},{3,5},{5,3}}", (3, 5)),
    ("source_target_pairs={{4,4}}", (4,)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
    (
      "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
      (0, 4),
    ),
  ],
)
def test_groups(text, expected):
  assert replica_groups.first(text) == expected


def test_an_unknown_notation():
  with pytest.raises(ValueError, match="no known notation"):
    replica_groups.first("replica_groups=someday")


def compiled(function, mesh, *arguments):
  """Compiles a function for arrays (shape, spec).

  Returns:
    The traced function, and the parsed text of its program.
  """
  placed = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    for shape, spec in arguments
  ]
  with jax.set_mesh(mesh):
    traced = jax.jit(function).trace(*placed)
    return traced, hlo.Program(traced.lower().compile().as_text())


def layers(x, w):
  """Three products, whose weights are gathered one after the other."""

  def layer(x, w):
    return sharding.constrain(jnp.tanh(x @ w), "batch"), None

  return jax.lax.scan(layer, sharding.constrain(x, "batch"), w)[0].sum()


def test_bodies_of_loops_count_as_often_as_they_run():
  mesh = sharding.make_mesh({"fsdp": 8})
  x, w = ((16, 64), P("fsdp")), ((3, 64, 64), P(None, "fsdp"))
  traced, program = compiled(layers, mesh, x, w)
  products = 3 * 2 * 16 * 64 * 64
  assert flops.count(traced.jaxpr.jaxpr) == products
  assert program.flops() == products // 8
  gathered = [c for c in program.collectives() if c.kind == "all-gather"]
  assert sum(c.bytes for c in gathered) == 3 * 64 * 64 * 4 * 7 // 8
  assert sum(c.count for c in gathered) == 3
  assert {c.group for c in gathered} == {tuple(range(8))}
  # Each layer copies its own slice of the stack of all layers' shards, reads
  # that to gather the weights, and reads those and activations twice. To read
  # the whole stack in its place would be a tenth more.
  whole, own, x = (4 * n for n in (64 * 64, 64 * 64 // 8, 2 * 64))
  moved = 3 * (2 * own + own + whole + whole + 2 * x + 2 * x)
  assert program.traffic() == pytest.approx(moved, rel=0.03)


def test_a_loop_of_unknown_length_is_an_error():
  """Counted once, the loop would hide all other iterations."""

  def f(x):
    halved = jax.lax.while_loop(
      lambda x: x.sum() > 1, lambda x: x @ x / 2, x.astype(jnp.float32)
    )
    return halved.sum()

  _, program = compiled(f, sharding.make_mesh({"data": 8}), ((8, 8), P()))
  for count in (program.flops, program.traffic, program.collectives):
    with pytest.raises(errors.UserError, match="how often the loop while"):
      count()


def test_work_that_every_device_repeats_shows():
  mesh = sharding.make_mesh({"fsdp": 8})

  def f(x, w):
    return jax.lax.with_sharding_constraint(x @ w, P())

  traced, program = compiled(f, mesh, ((8, 32), P()), ((32, 16), P()))
  assert program.flops() == flops.count(traced.jaxpr.jaxpr)


@pytest.mark.parametrize(
  ("axes", "kind", "size"),
  [
    ({"tensor": 8}, "all-reduce", 2 * 16 * 4 * 4 * 7 // 8),
    ({"data": 4, "tensor": 2}, "all-reduce", 2 * 4 * 4 * 4 * 1 // 2),
  ],
)
def test_sums(axes, kind, size):
  mesh = sharding.make_mesh(axes)

  def f(x, w):
    return jax.lax.with_sharding_constraint(x @ w, P("data"))

  _, program = compiled(
    f, mesh, ((16, 8), P("data", "tensor")), ((8, 4), P("tensor"))
  )
  (row,) = program.collectives()
  assert (row.kind, row.count, row.bytes) == (kind, 1, size)
  assert len(row.group) == mesh.shape["tensor"] and not row.overlaps


@pytest.mark.parametrize(
  "options",
  [
    {"window_strides": (1, 2), "padding": ((1, 1), (2, 0))},
    {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 1)},
    {
      "window_strides": (1, 1),
      "padding": ((1, 1),) * 2,
      "lhs_dilation": (2, 3),
    },
  ],
)
def test_convolutions(options):
  """Products with zeros of padding and dilation do not count."""
  x, kernel = np.ones((2, 6, 7, 4)), np.ones((3, 3, 4, 5))
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    **options,
  )
  program = jax.jit(convolve).lower(x, kernel).compile()
  # A product of ones is one: their sum is the number of products.
  expected = 2 * float(np.asarray(convolve(x, kernel)).sum())
  assert hlo.Program(program.as_text()).flops() == expected


def test_a_batch_of_products_as_a_tpu_writes_it():
  text = (
    "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf"
  )
  found = hlo_flops.convolution((5, 6, 8), (5, 6, 7), (5, 7, 8), text)
  assert found == 2 * 5 * math.prod((6, 7, 8))


# A stands for an array of 9 rows. The fusion adds a row of %received to %fast,
# which lies in a faster memory, and writes it into %a.
FUSED = """
%fused (parameters) -> A {
  %p0 = A parameter(0)
  %p1 = A parameter(1)
  %p2 = s32[] parameter(2)
  %p3 = f32[1,128]{1,0:S(1)} parameter(3)
  %zero = s32[] constant(0)
  %b = A bitcast(%p1)
  %slice = f32[1,128]{1,0} dynamic-slice(%b, %p2, %zero)
  %sum = f32[1,128]{1,0} add(%slice, %p3)
  ROOT %new = A dynamic-update-slice(%p0, %sum, %p2, %zero)
}

ENTRY %main (parameters) -> A {
  %a = A parameter(0)
  %b = A parameter(1)
  %i = s32[] parameter(2)
  %fast = f32[1,128]{1,0:T(1,128)S(1)} copy(%b)
  %sent = (A, A, u32[]{:S(2)}) collective-permute-start(%b), PAIRS
  %received = A collective-permute-done(%sent)
  ROOT %f = A fusion(%a, %received, %i, %fast), kind=kLoop, calls=%fused
}
""".replace(" A", " f32[9,128]{1,0}").replace("(A", "(f32[9,128]{1,0}")
FUSED = FUSED.replace("PAIRS", "source_target_pairs={{0,1},{1,0}}")


def test_slices_and_faster_memory_are_no_traffic():
  program = hlo.Program(FUSED)
  row, whole = 128 * 4, 9 * 128 * 4
  # The copy reads all of b; the transfer reads and writes it; the fusion reads
  # one row and its index, and writes one row in place.
  assert program.traffic() == whole + 2 * whole + row + 4 + row
  (found,) = program.collectives()
  assert found == ("collective-permute", (0, 1), True, 1, whole)


SCATTERED = """
%all-reduce-scatter (p: f32[64,128]) -> f32[8,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %sum = f32[64,128]{1,0} all-reduce(%p), channel_id=7, GROUPS, to_apply=%add
  %i = u32[] partition-id()
  ROOT %part = f32[8,128]{1,0} dynamic-slice(%sum, %i, %i)
}

ENTRY %main (p: f32[64,128]) -> f32[8,128] {
  %p = f32[64,128]{1,0} parameter(0)
  ROOT %f = f32[8,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
}
""".replace("GROUPS", "replica_groups={{0,1,2,3,4,5,6,7}}")


def test_a_tpus_reduce_scatter():
  (found,) = hlo.Program(SCATTERED).collectives()
  group = (0, 1, 2, 3, 4, 5, 6, 7)
  assert found == ("reduce-scatter", group, False, 1, 7 * 8 * 128 * 4)
