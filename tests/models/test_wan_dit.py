"""WanDiT against diffusers and Wan's own code, and its own properties.

Golden outputs are of diffusers' WanTransformer3DModel (commit 58eb52c) and of
Wan2.1's WanModel (commit 9737cba) with the same weights.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, tree
from dcvideogen_jax.models import wan_blocks, wan_dit
from tests import compiling, golden_data, random_weights

NAMES = ["t2v_dc", "t2v_wan", "i2v_dc", "i2v_wan"]
# Programs with the reference's attention are those of the activations, too.
CASES = [
  ("t2v_dc", "b1", "reference"),
  ("t2v_dc", "b2", "chunked"),
  ("t2v_wan", "b1", "chunked"),
  ("t2v_wan", "b2", "reference"),
  ("i2v_dc", "b1", "reference"),
  ("i2v_wan", "b1", "reference"),
]
TINY = {
  "layers": 2,
  "width": 24,
  "heads": 2,
  "ffn_width": 40,
  "in_channels": 6,
  "out_channels": 4,
  "patch": (1, 1, 1),
  "text_width": 10,
  "image_width": 8,
  "frequencies": 16,
}


@functools.cache
def load(name, **overrides):
  """Returns the module and variables of a golden model."""
  text = (golden_data.GOLDEN / "wan_dit" / f"{name}.json").read_text()
  config = {
    "_class_name": "WanTransformer3DModel",
    **json.loads(text)["config"],
  }
  weights = golden_data.weights("wan_dit", name)
  fields = convert.KINDS["wan_dit"].config_from(config)
  module, variables = convert.load("wan_dit", weights, fields)
  return module.clone(**overrides), variables


def arguments(name, case):
  io = golden_data.io("wan_dit", name)
  inputs = [
    io.get(f"in.{case}.{x}")
    for x in (
      "hidden_states",
      "timestep",
      "encoder_hidden_states",
      "encoder_hidden_states_image",
    )
  ]
  inputs[1] = inputs[1].astype(np.float32)
  return inputs


def run(module, variables, *inputs):
  """Returns the output and the intermediates."""
  apply = random_weights.jitted(module, mutable="intermediates")
  return apply(variables, *inputs)


@pytest.mark.parametrize(("name", "case", "attention"), CASES)
def test_golden_output(name, case, attention):
  module, variables = load(name, attention=attention)
  out, _ = run(module, variables, *arguments(name, case))
  for upstream in ("sample", "official_sample"):
    expected = golden_data.io("wan_dit", name)[f"out.{case}.{upstream}"]
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_golden_activations(name):
  module, variables = load(name)
  case = "b2" if name == "t2v_wan" else "b1"
  io = golden_data.io("wan_dit", name)
  _, state = run(module, variables, *arguments(name, case))
  found = state["intermediates"]
  names = {
    "self_attn_out": "attn1",
    "cross_attn_out": "attn2",
    "ffn_out": "ffn",
  }
  compared = 0
  for block in range(module.layers):
    for mine, theirs in (*names.items(), ("out", "")):
      key = f"out.{case}.act.blocks.{block}.{theirs}".rstrip(".")
      if key in io:
        np.testing.assert_allclose(
          found["blocks"][mine][0][block], io[key], atol=5e-5, rtol=0
        )
        compared += 1
  assert compared >= 4
  time = io[f"out.{case}.act.condition_embedder.timestep_proj"]
  np.testing.assert_allclose(found["time"][0][:, 0], time, atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near(name):
  """The reference's own bfloat16 output is as far from its float32."""
  module, variables = load(name)
  case = "b2" if name == "t2v_wan" else "b1"
  exact = golden_data.io("wan_dit", name)[f"out.{case}.sample"]
  half = module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  expected = jax.eval_shape(
    half.init, jax.random.key(0), *arguments(name, case)
  )
  rounded = jax.tree.map(
    lambda x, e: x.astype(e.dtype), variables["params"], expected["params"]
  )
  kept = {
    name for name, x in tree.flatten(rounded).items() if x.dtype == jnp.float32
  }
  assert any("time_embed" in name for name in kept)
  assert "head_modulation" in kept and "blocks/modulation" in kept
  assert "blocks/norm3/scale" in kept and "head/kernel" not in kept
  out = jax.jit(half.apply)({"params": rounded}, *arguments(name, case))
  assert out.dtype == jnp.bfloat16
  error = np.asarray(out, np.float32) - exact
  assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) < 0.012


@pytest.mark.parametrize("name", list(wan_dit.VARIANTS))
def test_parameter_counts(name):
  module = wan_dit.build(wan_dit.VARIANTS[name])
  text = jax.ShapeDtypeStruct((1, 8, module.text_width), jnp.float32)
  shape = (1, 2, 2, 2, module.in_channels)
  latents = jax.ShapeDtypeStruct(shape, jnp.float32)
  time = jax.ShapeDtypeStruct((1,), jnp.float32)
  image = None
  if module.image_width:
    shape = (1, module.image_positions or 257, module.image_width)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = jax.eval_shape(
    module.init, jax.random.key(0), latents, time, text, image
  )
  assert (
    sum(x.size for x in jax.tree.leaves(variables))
    == {
      "wan2.1-t2v-1.3b": 1_418_996_800,
      "wan2.1-t2v-14b": 14_288_491_584,
      "wan2.1-i2v-14b": 16_394_878_784,
      "wan2.1-flf2v-14b": 16_394_878_784 + 514 * 1280,
      "dc-wan2.1-t2v-1.3b": 1_418_898_464,
      "dc-wan2.1-t2v-14b": 14_288_163_872,
      "dc-wan2.1-i2v-14b": 16_394_325_792,
    }[name]
  )


def _random(module, seed=0):
  """Returns inputs and variables, all random."""
  random = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)

  inputs = [
    normal(2, 3, 2, 4, module.in_channels),
    jnp.asarray([30.0, 700.0]),
    normal(2, 5, module.text_width),
    normal(2, 7, module.image_width) if module.image_width else None,
  ]
  return inputs, random_weights.of(module, *inputs, scale=0.2)


def test_time_is_exact_where_products_are_not():
  """The time embedding ignores the default matmul precision."""
  module = wan_dit.build(TINY).clone(dtype=jnp.bfloat16)
  inputs, variables = _random(module)
  with jax.default_matmul_precision("bfloat16"):
    text = str(jax.make_jaxpr(module.apply)(variables, *inputs))
  highest = text.count("precision=Precision.HIGHEST") or text.count("HIGHEST")
  assert highest >= 3


def test_timesteps_per_frame():
  module = wan_dit.build(TINY)
  (latents, times, *rest), variables = _random(module)
  apply = random_weights.jitted(module)
  whole = apply(variables, latents, times, *rest)
  repeated = jnp.repeat(times[:, None], 3, axis=1)
  np.testing.assert_allclose(
    apply(variables, latents, repeated, *rest), whole, atol=1e-6
  )
  changed = apply(variables, latents, repeated.at[:, 1].add(200), *rest)
  assert np.abs(changed - whole)[:, 1].max() > 1e-2


@pytest.mark.parametrize("remat", [False, True])
def test_lora_starts_as_nothing_and_learns(remat):
  plain = wan_dit.build(TINY)
  module = plain.clone(lora_rank=3, lora_alpha=6.0, remat=remat)
  inputs, variables = _random(plain)
  start = jax.jit(module.init)(jax.random.key(1), *inputs)
  lora = start["lora"]
  names = {name.rsplit("/", 1)[0] for name in tree.names(lora)}
  assert names == {
    "time_embed/linear_1",
    "time_embed/linear_2",
    "time_proj",
    *(f"blocks/self_attn/{x}" for x in "qkvo"),
    "blocks/ffn/linear_1",
    "blocks/ffn/linear_2",
  }
  assert lora["blocks"]["self_attn"]["q"]["a"].shape == (2, 24, 3)
  params = variables["params"]
  jit = functools.partial(jax.jit, compiler_options=compiling.AS_PROGRAMS)
  expected = jit(plain.apply)(variables, *inputs)
  apply = jit(module.apply)
  np.testing.assert_array_equal(
    apply({"params": params, "lora": lora}, *inputs), expected
  )
  np.testing.assert_array_equal(apply({"params": params}, *inputs), expected)

  def loss(lora):
    return (module.apply({"params": params, "lora": lora}, *inputs) ** 2).sum()

  gradients = tree.flatten(jax.jit(jax.grad(loss))(lora))
  assert all(
    np.abs(g).max() > 0 for name, g in gradients.items() if name[-1] == "b"
  )


def test_remat_changes_no_gradient():
  module = wan_dit.build(TINY)
  inputs, variables = _random(module)

  def gradients(module):
    def loss(v):
      return (module.apply(v, *inputs) ** 2).mean()

    return jax.jit(jax.grad(loss))(variables)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
    gradients(module),
    gradients(module.clone(remat=True)),
  )


def test_one_block_is_compiled_whatever_the_depth():
  def size(layers):
    module = wan_dit.build({**TINY, "layers": layers})
    inputs, variables = _random(module)
    return len(jax.jit(module.apply).lower(variables, *inputs).as_text())

  assert size(12) < 1.05 * size(2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"in_channels": 5}, "expected 5 channels, found 6"),
    ({"patch": (1, 2, 3)}, "no multiple of the patch"),
    ({"image_width": None}, "image features"),
  ],
)
def test_inputs_that_do_not_fit(change, message):
  inputs, _ = _random(wan_dit.build(TINY))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      wan_dit.build({**TINY, **change}).init, jax.random.key(0), *inputs
    )


def test_wrong_number_of_timesteps(wrong_shapes):
  module = wan_dit.build(TINY)
  (latents, _, *rest), _ = _random(module)
  with pytest.raises(ValueError, match="timesteps"):
    jax.eval_shape(module.init, jax.random.key(0), latents, jnp.ones(3), *rest)


def test_odd_head():
  with pytest.raises(ValueError, match="heads"):
    wan_dit.build({**TINY, "heads": 8})


@pytest.mark.parametrize("rank", [0, 2])
def test_feed_forward_in_pieces(monkeypatch, rank):
  """Pieces give the same with less memory."""
  dense = {"lora_rank": rank, "lora_alpha": 1.0}
  mlp = wan_blocks.MLP(512, 8, wan_blocks.gelu_tanh, dense, "tokens")
  x = np.random.default_rng(0).normal(size=(2, 1000, 8)).astype(np.float32)
  variables = random_weights.of(mlp, x)
  assert len(tree.names(variables)) == (4 if not rank else 8)

  def program(piece):
    monkeypatch.setattr(wan_blocks, "PIECE", piece)
    return jax.jit(lambda *x: mlp.apply(*x)).lower(variables, x).compile()

  whole, pieces = program(1000), program(210)
  np.testing.assert_allclose(
    pieces(variables, x), whole(variables, x), rtol=0, atol=1e-6
  )
  bytes_ = [x.memory_analysis().temp_size_in_bytes for x in (whole, pieces)]
  assert bytes_[1] < 0.4 * bytes_[0]
