"""Whole checkpoints as trainers save them; warnings name what is left out."""

import itertools
import warnings

import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from tests import random_weights
from tests.convert import checkpoints

FIELDS = checkpoints.T2V | {"layers": 2}
LAYOUTS = ("diffusers", "original")


@pytest.fixture(scope="module")
def plain():
  """Returns a random state dict for each layout."""
  return {
    layout: checkpoints.state_dict("wan_dit", FIELDS, layout)
    for layout in LAYOUTS
  }


def load(source):
  module, variables = convert.load("wan_dit", source, FIELDS)
  return lambda layout: convert.to_torch("wan_dit", module, variables, layout)


def prefixed(prefix, tensors):
  return {prefix + name: x for name, x in tensors.items()}


def inside(word, tensors):
  """Renames tensors as if every block were wrapped."""
  return {
    name.replace(f"blocks.{i}.", f"blocks.{i}.{word}."): x
    for name, x in tensors.items()
    for i in [name.split(".")[1] if name.startswith("blocks") else "none"]
  }


WORDS = ["module", "_orig_mod", "model", "pipe.dit", "0"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_words_in_front_in_any_order(plain, layout):
  orders = [*itertools.permutations(WORDS[:3]), WORDS[2:], WORDS[:2]]
  for order in [*orders, ["diffusion_model"], ["model", "diffusion_model"]]:
    prefix = ".".join(order) + "."
    found = load(prefixed(prefix, plain[layout]))(layout)
    checkpoints.assert_same(found, plain[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
  "word",
  [
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod",
  ],
)
def test_words_in_between(plain, layout, word):
  wrapped = inside(word, plain[layout])
  assert f"blocks.1.{word}.modulation" in wrapped or layout == "diffusers"
  found = load(prefixed(f"module.{word}.", wrapped))(layout)
  checkpoints.assert_same(found, plain[layout])


def test_names_that_a_word_makes_equal(plain):
  twice = {**plain["original"], **prefixed("_orig_mod.", plain["original"])}
  with pytest.raises(errors.UserError, match="twice, wrapped and not wrapped"):
    load(twice)
  flat = {"_fsdp_wrapped_module._flat_param": np.ones(9, np.float32)}
  with pytest.raises(errors.UserError, match=r"flat parameters of FSDP"):
    load(flat)


def half(tensors):
  return {name: x / 2 for name, x in tensors.items()}


@pytest.mark.parametrize(
  ("averaged", "other"),
  [
    ("generator_ema.model.", "generator.model."),
    ("ema.", "model."),
    ("model_ema.", "model."),
    ("ema_model.module.", "online_model.module."),
    ("ema.", ""),
    ("shadow.", "module."),
  ],
)
def test_averages_come_before_what_they_are_of(plain, averaged, other):
  """DC-VideoGen's files have averages; a warning says that they are taken."""
  weights = plain["original"]
  both = {**prefixed(other, weights), **prefixed(averaged, half(weights))}
  with pytest.warns(UserWarning, match=f"is the average behind '{averaged}'"):
    found = load(both)("original")
  checkpoints.assert_same(found, half(weights))


def test_averages_of_a_part(plain):
  weights = plain["original"]
  part = {n: x for n, x in half(weights).items() if n.startswith("patch")}
  with pytest.warns(UserWarning, match="2 tensors, in place of 'model.'"):
    found = load({**prefixed("model.", weights), **prefixed("ema.", part)})
  checkpoints.assert_same(found("original"), {**weights, **part})


def test_only_averages(plain):
  weights = plain["diffusers"]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = load(prefixed("ema_model.", weights))("diffusers")
  checkpoints.assert_same(found, weights)


def test_what_a_generator_is_trained_against_is_left_out(plain):
  weights = plain["original"]
  content = {
    **prefixed("fake_score.model.", half(weights)),
    **prefixed("generator.model.", weights),
    **prefixed("real_score.model.", half(weights)),
    "optimizer.state.0.exp_avg": np.ones(3, np.float32),
  }
  told = r"behind 'generator.model.'; \d+ other tensors are left out, such as"
  with pytest.warns(UserWarning, match=told):
    found = load(content)("original")
  checkpoints.assert_same(found, weights)


def test_two_models_that_could_be_meant(plain):
  weights = plain["original"]
  both = {**prefixed("first.", weights), **prefixed("second.", weights)}
  told = "holds 2 models of wan_dit, behind 'first.', 'second.': expected one"
  with pytest.raises(errors.UserError, match=told):
    load(both)
  both = {**prefixed("ema_1.", weights), **prefixed("ema_2.", weights)}
  with pytest.raises(errors.UserError, match="holds 2 models of wan_dit"):
    load(both)


def test_one_model_of_a_file_with_all(plain):
  """ComfyUI packs a pipeline so: every kind is found behind its prefix."""
  vision = {
    "image_size": 8,
    "patch": 4,
    "layers": 2,
    "width": 16,
    "heads": 2,
    "ffn_width": 24,
  }
  clip = checkpoints.state_dict("clip_vision", vision, "transformers")
  content = {
    **prefixed("model.diffusion_model.", plain["original"]),
    **prefixed("clip_vision.", clip),
  }
  with pytest.warns(UserWarning, match="other tensors are left out"):
    found = load(content)("original")
  checkpoints.assert_same(found, plain["original"])
  with pytest.warns(UserWarning, match="'clip_vision.'; .* such as model.diff"):
    module, variables = convert.load("clip_vision", content, vision)
  found = convert.to_torch("clip_vision", module, variables, "transformers")
  checkpoints.assert_same(found, clip)


def test_unknown_names_behind_the_prefix_are_not_passed_over(plain):
  """Only tensors outside the model's prefix may be left out."""
  weights = plain["original"] | {"blocks.0.extra.weight": np.ones(2, "f4")}
  with pytest.raises(errors.UserError, match=r"unexpected blocks\.0\.extra"):
    load(prefixed("module.", weights))


def test_when_no_name_fits(plain):
  """The message has examples of expected and found names, not a full list."""
  content = {f"net.layer{i}.w": np.ones(2, np.float32) for i in range(9)}
  with pytest.raises(errors.UserError) as caught:
    load(content)
  assert str(caught.value) == (
    "the mapping does not hold a wan_dit: expected names such as"
    " patch_embedding.weight, found 9 such as"
    " net.layer0.w, net.layer1.w, net.layer2.w"
  )
  with pytest.raises(errors.UserError, match="these are names of wan_dit$"):
    convert.load("umt5", plain["diffusers"])
  with pytest.raises(errors.UserError, match="holds no weights of wan_dit"):
    load({})


# --- other tensors among weights ---------------------------------------------


TEXT = {
  "vocab": 40,
  "layers": 2,
  "width": 16,
  "heads": 2,
  "head_width": 8,
  "ffn_width": 24,
}


@pytest.fixture(scope="module")
def umt5():
  return checkpoints.state_dict("umt5", TEXT, "transformers")


def load_text(source):
  module, variables = convert.load("umt5", source, TEXT)
  return convert.to_torch("umt5", module, variables, "transformers")


def test_what_lies_among_weights(umt5):
  """A tokenizer causes a warning; counters of averages are ignored."""
  counters = {"n_averaged": np.int64(5), "decay": np.float32(0.99)}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    checkpoints.assert_same(load_text({**umt5, **counters}), umt5)
  tokenizer = {"spiece_model": np.frombuffer(b"not a real model", np.uint8)}
  with pytest.warns(UserWarning, match="left out spiece_model, bytes that lie"):
    checkpoints.assert_same(load_text({**umt5, **tokenizer}), umt5)
  other = {"extra": np.ones(2, np.float32)}
  with pytest.raises(errors.UserError, match=r"unexpected extra \(2,\)"):
    load_text({**umt5, **other})


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_one_embedding_under_any_of_its_names(umt5, name, prefix):
  """Writers that drop duplicates keep one of the names, and not always ours."""
  tied = prefixed(prefix, umt5)
  values = tied.pop(f"{prefix}shared.weight")
  tied[f"{prefix}{name}.embed_tokens.weight"] = values
  checkpoints.assert_same(load_text(tied), umt5)
  checkpoints.assert_same(load_text({**tied, **prefixed(prefix, umt5)}), umt5)


def test_two_embeddings_are_not_chosen_from(umt5):
  other = umt5["shared.weight"].copy()
  other[-1, -1] += 1
  with pytest.raises(
    errors.UserError, match="two different arrays for what is"
  ):
    load_text({**umt5, "encoder.embed_tokens.weight": other})


@pytest.mark.parity
def test_embeddings_as_safetensors_and_torch_write_them(tmp_path):
  """transformers' own loader is the reference."""
  import safetensors.torch
  import torch
  from transformers import UMT5Config, UMT5EncoderModel

  torch.manual_seed(0)
  config = UMT5Config(
    vocab_size=40,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
  )
  model = UMT5EncoderModel(config).eval()
  ids = torch.arange(3, 13)[None]
  with torch.no_grad():
    expected = model(ids, torch.ones_like(ids)).last_hidden_state.numpy()
  for name in ("model.safetensors", "pytorch_model.bin"):
    directory = tmp_path / name
    directory.mkdir()
    config.save_pretrained(directory)
    if name == "model.safetensors":
      safetensors.torch.save_model(model, str(directory / name))
      keys = safetensors.torch.load_file(directory / name).keys()
      assert "shared.weight" not in keys
    else:
      torch.save(model.state_dict(), directory / name)
    module, variables = convert.load("umt5", directory)
    apply = random_weights.jitted(module)
    found = apply(variables, ids.numpy(), np.ones_like(ids.numpy()))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)


# --- files of trainers -------------------------------------------------------


def content(name, weights):
  """Returns what each trainer gives to torch.save."""
  import argparse
  import collections
  import pathlib

  import torch

  settings = {
    "epoch": 3,
    "args": argparse.Namespace(lr=1e-4, output=pathlib.PurePosixPath("out")),
    "metrics": collections.defaultdict(list, {"loss": [0.5]}),
    "best": np.float64(0.5),
    "sizes": torch.Size([3, 4]),
    "names": {"a", "b"},
    "nothing": None,
  }
  optimizer = {
    "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}},
    "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}],
  }
  return {
    "lightning": {
      "state_dict": prefixed("model.", weights),
      "optimizer_states": [optimizer],
      **settings,
    },
    "model": {"model": weights, "step": 7},
    "model and optimizer": {"model": weights, "optimizer": optimizer},
    "deepspeed": {"module": weights, "global_steps": 7, "optimizer": None},
    "only ema": {"ema": weights},
    "settings": {"net": {"model": weights}, **settings},
    "checkpointed": {
      "state_dict": prefixed("module.", inside("_orig_mod", weights)),
    },
    "counter": {**weights, "n_averaged": torch.tensor(5)},
  }[name]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.*other tensors are left out")
@pytest.mark.parametrize(
  "name",
  [
    "lightning",
    "model",
    "model and optimizer",
    "deepspeed",
    "only ema",
    "settings",
    "checkpointed",
    "counter",
  ],
)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_files_of_trainers(tmp_path, plain, name, suffix):
  import torch

  weights = plain["original"]
  tensors = {n: torch.from_numpy(x) for n, x in weights.items()}
  path = tmp_path / f"x{suffix}"
  torch.save(content(name, tensors), path)
  checkpoints.assert_same(load(path)("original"), weights)
