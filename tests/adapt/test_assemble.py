"""A transformer for new latents made from another one, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors, tree
from dcvideogen_jax.adapt import assemble
from tests.adapt import tiny_models


def leaves(name, seed):
  return tree.flatten(
    tiny_models.variables(tiny_models.module(name), seed)["params"]
  )


def shapes(flat):
  return {name: x.shape for name, x in flat.items()}


def assembled(target, source, same_space=False, patch_embed=None):
  """Assembles the target from the source.

  Returns:
    Random leaves of the target and of the source, the assembled leaves, and the
    names of those that are new.
  """
  new, old = leaves(target, 1), leaves(source, 2)
  names = assemble.new_parameters(shapes(new), shapes(old), same_space)
  found = assemble.assemble(
    shapes(new), old, {name: new[name] for name in names}, patch_embed
  )
  return new, old, tree.flatten(found), names


SPACE = ["head/bias", "head/kernel", "patch_embed/bias", "patch_embed/kernel"]


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_all_but_patch_embedding_and_head_is_copied(kind):
  new, old, found, names = assembled(f"deep_{kind}", f"base_{kind}")
  assert sorted(names) == SPACE
  assert found.keys() == new.keys()
  for name, value in found.items():
    origin = new if name in SPACE else old
    np.testing.assert_array_equal(value, origin[name], err_msg=name)


def test_the_patch_embedding_of_the_first_phase():
  learned = {
    "kernel": jnp.full((1, 1, 1, 6, 16), 3.0),
    "bias": jnp.full(16, 4.0),
  }
  _, _, found, _ = assembled("deep_t2v", "base_t2v", patch_embed=learned)
  for name, value in learned.items():
    np.testing.assert_array_equal(found[f"patch_embed/{name}"], value)


IMAGE = ("image_embed/", "blocks/cross_attn/k_img/", "blocks/cross_attn/v_img/")


@pytest.mark.parametrize("same_space", [False, True])
def test_image_to_video_from_text_to_video(same_space):
  source = "deep_t2v" if same_space else "base_t2v"
  new, old, found, names = assembled("deep_i2v", source, same_space)
  added = [name for name in names if name not in SPACE]
  assert all(name.startswith(IMAGE) or "norm_k_img" in name for name in added)
  for name, value in found.items():
    if name.startswith("blocks/cross_attn/v_img/"):
      np.testing.assert_array_equal(value, 0, err_msg=name)
    elif name == "patch_embed/kernel" and same_space:
      np.testing.assert_array_equal(value[..., :6, :], old[name])
      np.testing.assert_array_equal(value[..., 6:, :], 0)
    else:
      origin = new if name in names else old
      np.testing.assert_array_equal(value, origin[name], err_msg=name)


def test_image_to_video_begins_as_text_to_video():
  """The image changes no output at first, but its weights get gradients."""
  _, old, found, _ = assembled("deep_i2v", "deep_t2v", same_space=True)
  rng = np.random.default_rng(0)
  noisy, image, text, features = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((1, 2, 3, 3, 6), (1, 2, 3, 3, 10), (1, 4, 12), (1, 3, 10))
  )
  timestep = jnp.asarray([400.0])
  before = jax.jit(tiny_models.module("deep_t2v").apply)(
    {"params": nested("deep_t2v", old)}, noisy, timestep, text
  )
  conditioned = jnp.concatenate([noisy, image], axis=-1)

  def predict(params):
    module = tiny_models.module("deep_i2v")
    found = module.apply(
      {"params": params}, conditioned, timestep, text, features
    )
    return jnp.square(found).sum(), found

  both = jax.jit(jax.value_and_grad(predict, has_aux=True))
  (_, after), grads = both(nested("deep_i2v", found))
  np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
  grads = tree.flatten(grads)
  assert np.abs(grads["blocks/cross_attn/v_img/kernel"]).max() > 0
  assert np.abs(grads["patch_embed/kernel"][..., 6:, :]).max() > 0


def nested(name, flat):
  like = tiny_models.abstract(tiny_models.module(name))["params"]
  return jax.tree.unflatten(jax.tree.structure(like), flat.values())


def test_the_same_space_copies_everything():
  _, old, found, names = assembled("deep_i2v", "deep_i2v", same_space=True)
  assert not names
  assert all(found[name] is value for name, value in old.items())


@pytest.mark.parametrize(
  ("target", "source", "same_space", "message"),
  [
    ("deep_t2v", "base_t2v", True, "shape of patch_embed/kernel"),
    ("deep_t2v", "base_i2v", False, "unexpected image_embed/linear_1/kernel"),
    ("base_i2v", "deep_t2v", True, "shape of patch_embed/kernel"),
  ],
)
def test_weights_of_another_model(target, source, same_space, message):
  with pytest.raises(errors.UserError, match=message):
    assembled(target, source, same_space)


def test_a_patch_embedding_of_another_width():
  learned = {"kernel": jnp.ones((1, 1, 1, 6, 12)), "bias": jnp.ones(12)}
  with pytest.raises(errors.UserError, match="shape of patch_embed/bias"):
    assembled("deep_t2v", "base_t2v", patch_embed=learned)


@pytest.mark.parametrize(
  ("change", "same_space", "fits"),
  [
    ({}, True, True),
    ({"heads": 4}, False, False),
    ({"eps": 1e-5}, False, False),
    ({"rope_scale": (1, 2, 2)}, False, True),
    ({"rope_scale": (1, 2, 2)}, True, False),
    ({"patch": (1, 1, 1), "in_channels": 16}, True, False),
  ],
)
def test_what_shapes_do_not_tell(change, same_space, fits):
  source, target = (
    tiny_models.module("base_t2v"),
    tiny_models.module("base_t2v", **change),
  )
  if fits:
    assemble.require_compatible(target, source, same_space)
    return
  (name, *_) = change
  with pytest.raises(errors.UserError, match=f"another model's.*{name} "):
    assemble.require_compatible(target, source, same_space)
