"""UMT5 against transformers 5.23 and Wan 2.1 commit 9737cba.

The golden numbers are transformers'; Wan's own module differs from them by
4.1e-6 at most (see golden/umt5/umt5_tiny.json).
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import umt5 as table
from dcvideogen_jax.models import umt5
from tests import golden_data, random_weights

HIDDEN = 2e-5  # max abs
CASES = ("padded", "long")


def config():
  path = golden_data.GOLDEN / "umt5" / "umt5_tiny.json"
  return json.loads(path.read_text())["config"] | {"model_type": "umt5"}


@functools.cache
def load():
  weights = golden_data.weights("umt5", "umt5_tiny")
  return convert.load("umt5", weights, config())


def inputs(case):
  golden = golden_data.io("umt5", "umt5_tiny")
  ids = golden[f"in.{case}.input_ids"].astype(np.int32)
  return ids, golden[f"in.{case}.attention_mask"].astype(np.int32)


def run(ids, mask, **fields):
  module, variables = load()
  apply = random_weights.jitted(module.clone(**fields))
  return apply(variables, ids, mask)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_equal_the_reference(case):
  golden = golden_data.io("umt5", "umt5_tiny")
  hidden = run(*inputs(case))
  expected = golden[f"out.{case}.last_hidden_state"]
  np.testing.assert_allclose(hidden, expected, rtol=0, atol=HIDDEN)
  prompt = umt5.zero_padding(hidden, inputs(case)[1])
  expected = golden[f"out.{case}.prompt_embeds"]
  np.testing.assert_allclose(prompt, expected, rtol=0, atol=HIDDEN)


def test_each_block_equals_the_reference():
  golden = golden_data.io("umt5", "umt5_tiny")
  module, variables = load()
  apply = random_weights.jitted(module, mutable="intermediates")
  _, state = apply(variables, *inputs("long"))
  (hidden,) = state["intermediates"]["blocks"]["hidden"]
  expected = golden["out.long.hidden_states.1"]
  np.testing.assert_allclose(hidden[0], expected, rtol=0, atol=HIDDEN)


def test_relative_buckets_equal_the_reference():
  golden = golden_data.io("umt5", "umt5_tiny")
  found = umt5.relative_buckets(golden["out.relative_position"])
  np.testing.assert_array_equal(found, golden["out.relative_position_bucket"])


def test_padding_has_no_influence():
  """A padded text gives the same as without padding."""
  ids, mask = inputs("padded")
  length = int(mask[1].sum())
  assert length < ids.shape[1]
  prompt = umt5.zero_padding(run(ids, mask), mask, 40)
  assert prompt.shape[:2] == (2, 40)
  alone = run(ids[1:, :length], mask[1:, :length])
  alone = umt5.zero_padding(alone, mask[1:, :length], 40)
  np.testing.assert_allclose(alone[0], prompt[1], rtol=0, atol=HIDDEN)
  assert not np.any(alone[0, length:]) and np.all(np.any(alone[0, :length], 1))
  with pytest.raises(ValueError, match="8 tokens or less"):
    umt5.zero_padding(run(ids, mask), mask, 8)


def test_tokens_beyond_the_vocabulary_show():
  ids, mask = inputs("padded")
  ids = np.where(np.arange(ids.shape[1])[None] == 3, load()[0].vocab, ids)
  assert np.isnan(run(ids, mask)).any()


def test_remat_changes_no_gradient():
  ids, mask = (x[:, :6] for x in inputs("padded"))

  def gradient(remat):
    module, variables = load()
    module = module.clone(remat=remat)

    def loss(variables):
      return jnp.sum(module.apply(variables, ids, mask) ** 3)

    assert ("remat" in str(jax.make_jaxpr(loss)(variables))) == remat
    return jax.jit(jax.grad(loss))(variables)

  for plain, again in zip(
    *map(jax.tree.leaves, (gradient(False), gradient(True))), strict=True
  ):
    assert np.any(plain)
    np.testing.assert_allclose(plain, again, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_stays_near_float32(case):
  golden = golden_data.io("umt5", "umt5_tiny")
  real = inputs(case)[1] != 0
  rounded = run(*inputs(case), dtype=jnp.bfloat16)
  assert rounded.dtype == jnp.bfloat16
  expected = golden[f"out.{case}.last_hidden_state"]
  error = np.abs(rounded.astype(np.float32) - expected)[real].max()
  # The reference's own bfloat16 is 0.08 away.
  assert 1e-3 < error < 0.12


@pytest.mark.parametrize("layout", [*table.LAYOUTS])
def test_every_layout_round_trips(layout):
  module, variables = load()
  state_dict = convert.to_torch("umt5", module, variables, layout)
  again, restored = convert.load("umt5", state_dict, config())
  assert again == module
  jax.tree.map(np.testing.assert_array_equal, restored, variables)
  for name, x in convert.to_torch("umt5", again, restored, layout).items():
    np.testing.assert_array_equal(x, state_dict[name])


def test_transformers_names_are_the_reference():
  state_dict = convert.to_torch("umt5", *load())
  weights = golden_data.weights("umt5", "umt5_tiny")
  assert state_dict.keys() == weights.keys()
  for name, x in weights.items():
    np.testing.assert_array_equal(state_dict[name], x)


def test_original_names_are_the_reference():
  path = golden_data.GOLDEN / "umt5" / "umt5_tiny.json"
  patterns = json.loads(path.read_text())["official_to_hf_patterns"]
  weights = golden_data.weights("umt5", "umt5_tiny")
  state_dict = convert.to_torch("umt5", *load(), layout="original")
  for official, name in patterns.items():
    for i in (0, 1):
      x = state_dict.pop(official.format(i=i), None)
      if x is not None:
        np.testing.assert_array_equal(x, weights[name.format(i=i)])
  assert not state_dict


def test_second_name_of_the_embedding_is_ignored():
  weights = golden_data.weights("umt5", "umt5_tiny")
  weights = weights | {"encoder.embed_tokens.weight": weights["shared.weight"]}
  _, variables = convert.load("umt5", weights, config())
  jax.tree.map(np.testing.assert_array_equal, variables, load()[1])


def test_xxl_has_the_released_size():
  module = umt5.build(umt5.VARIANTS["umt5_xxl"])
  ids = jax.ShapeDtypeStruct((1, 8), np.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
  leaves = jax.tree.leaves(shapes)
  assert sum(leaf.size for leaf in leaves) == 5_680_910_336
  assert {leaf.shape[0] for leaf in jax.tree.leaves(shapes["blocks"])} == {24}


def test_config_json_goes_both_ways():
  fields = umt5.VARIANTS["umt5_xxl"]
  json = table.config_to(fields)
  assert umt5.build(table.config_from(json)) == umt5.build(fields)
  assert table.config_from({"model_type": "t5"}) is None
  with pytest.raises(errors.UserError, match="gated-silu"):
    table.config_from(json | {"feed_forward_proj": "gated-silu"})


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"layers": 0}, "layers is 0"),
    ({"buckets": 30}, "multiple of 4"),
    ({"max_distance": 8}, "max_distance is 8"),
    ({"dtype": jnp.float16}, "float16"),
    ({"lenght": 3}, "lenght"),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises((TypeError, ValueError), match=message):
    umt5.build(umt5.VARIANTS["umt5_xxl"], **fields)


@pytest.mark.parity
def test_equals_the_installed_transformers(tmp_path):
  """Its files load with the same output, and it opens this project's files."""
  import torch
  import transformers

  torch.manual_seed(1)
  reference = transformers.UMT5EncoderModel(
    transformers.UMT5Config(
      vocab_size=97,
      d_model=24,
      d_kv=5,
      d_ff=40,
      num_layers=3,
      num_heads=4,
      relative_attention_num_buckets=16,
      relative_attention_max_distance=40,
    )
  ).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(torch.randn_like(parameter) * 0.1)
  rng = np.random.default_rng(2)
  ids = rng.integers(0, 97, (2, 70)).astype(np.int32)
  mask = (np.arange(70)[None] < np.array([[70], [11]])).astype(np.int32)
  with torch.no_grad():
    expected = reference(
      torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
    ).last_hidden_state.numpy()
  reference.save_pretrained(tmp_path / "theirs")

  module, variables = convert.load("umt5", tmp_path / "theirs")
  hidden = jax.jit(module.apply)(variables, ids, mask)
  np.testing.assert_allclose(hidden, expected, rtol=0, atol=HIDDEN)

  convert.save(
    tmp_path / "ours", "umt5", module, variables, layout="transformers"
  )
  opened, report = transformers.UMT5EncoderModel.from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  for name, x in opened.state_dict().items():
    assert torch.equal(x, reference.state_dict()[name]), name
