"""Which groups of parameters each phase trains."""

import pytest

from dcvideogen_jax import errors, tree
from dcvideogen_jax.adapt import phases
from tests.adapt import tiny_models

# How the paper and the official code treat each group of a transformer's leaves
# in the end-to-end phase: trained fully ("full"), by a low-rank update
# ("lora"), or not at all ("frozen"). Original names of "full": patch_embedding,
# head, head.modulation; of "lora": time_embedding.{0,2}, time_projection.1,
# blocks.*.self_attn.{q,k,v,o}, blocks.*.ffn.{0,2}.
GROUPS = {
  "patch_embed": "full",
  "head": "full",
  "head_modulation": "full",
  "time_embed/linear_1": "lora",
  "time_embed/linear_2": "lora",
  "time_proj": "lora",
  "blocks/self_attn/q": "lora",
  "blocks/self_attn/k": "lora",
  "blocks/self_attn/v": "lora",
  "blocks/self_attn/o": "lora",
  "blocks/ffn/linear_1": "lora",
  "blocks/ffn/linear_2": "lora",
  "blocks/self_attn/norm_q": "frozen",
  "blocks/self_attn/norm_k": "frozen",
  "blocks/norm3": "frozen",
  "blocks/modulation": "frozen",
  "blocks/cross_attn/q": "frozen",
  "blocks/cross_attn/k": "frozen",
  "blocks/cross_attn/v": "frozen",
  "blocks/cross_attn/o": "frozen",
  "blocks/cross_attn/norm_q": "frozen",
  "blocks/cross_attn/norm_k": "frozen",
  "text_embed/linear_1": "frozen",
  "text_embed/linear_2": "frozen",
}
IMAGE_GROUPS = {
  "blocks/cross_attn/k_img": "frozen",
  "blocks/cross_attn/v_img": "frozen",
  "blocks/cross_attn/norm_k_img": "frozen",
  "image_embed/norm1": "frozen",
  "image_embed/linear_1": "frozen",
  "image_embed/linear_2": "frozen",
  "image_embed/norm2": "frozen",
}
LEAVES = {"kernel", "bias", "scale", "a", "b"}


def groups(name, phase):
  """Returns how a phase treats each group: "full", "lora" or "frozen"."""
  row = phases.PHASES[phase]
  module = tiny_models.module(
    name, lora_rank=2 if row.lora else 0, lora_alpha=4.0
  )
  variables = tiny_models.abstract(module)
  trains = tree.match(row.trainable, tree.names(variables))
  found = {}
  for leaf, value in trains.items():
    collection, path = leaf.split("/", 1)
    head, _, last = path.rpartition("/")
    group = head if last in LEAVES else path
    if collection == "lora":
      assert value, f"{leaf} is there, and does not train"
    kind = {"params": "full", "lora": "lora"}[collection] if value else "frozen"
    found.setdefault(group, set()).add(kind)
  # A layer with a low-rank update is itself frozen, and so is its bias.
  return {
    group: "lora" if kinds == {"lora", "frozen"} else kinds.pop()
    for group, kinds in found.items()
  }


@pytest.mark.parametrize("phase", ["lora", "direct"])
@pytest.mark.parametrize("name", ["deep_t2v", "deep_i2v"])
def test_end_to_end(name, phase):
  image = IMAGE_GROUPS if name == "deep_i2v" else {}
  assert groups(name, phase) == GROUPS | image


@pytest.mark.parametrize("name", ["deep_t2v", "deep_i2v"])
def test_only_patch_embedding_and_head(name):
  image = IMAGE_GROUPS if name == "deep_i2v" else {}
  expected = {
    group: "full" if kind == "full" else "frozen"
    for group, kind in (GROUPS | image).items()
  }
  assert groups(name, "head") == expected
  embed = {g: k for g, k in groups(name, "embed").items() if k != "frozen"}
  assert embed == {"patch_embed": "full"}


@pytest.mark.parametrize("phase", ["guidance", "few"])
def test_distillation_trains_low_rank_updates_alone(phase):
  expected = {
    group: "lora" if kind == "lora" else "frozen"
    for group, kind in (GROUPS | IMAGE_GROUPS).items()
  }
  assert groups("deep_i2v", phase) == expected
  leaves = ["critic/lora/time_proj/a", "critic/params/time_proj/kernel"]
  for name in (phase, f"{phase}_full"):
    assert all(tree.match(phases.PHASES[name].trainable, leaves).values())


@pytest.mark.parametrize(
  "phase", ["full", "scratch", "base", "guidance_full", "few_full"]
)
def test_everything(phase):
  expected = dict.fromkeys(GROUPS | IMAGE_GROUPS, "full")
  assert groups("base_i2v", phase) == expected


def test_teacher_and_encoders_never_train():
  leaves = ["teacher/patch_embed/kernel", "encoders/deep/head/kernel"]
  for name, phase in phases.PHASES.items():
    found = tree.match(phase.trainable, leaves)
    assert not any(found.values()), name


def test_aligned_phases_follow_each_other():
  chain = [phases.PHASES[name] for name in ("embed", "head", "lora")]
  assert [p.task for p in chain] == ["align", "denoise", "denoise"]
  assert [p.starts for p in chain] == [("base",), ("base",), ("weights",)]


def test_unknown_phase():
  with pytest.raises(errors.UserError, match="one of embed, head, lora"):
    phases.find("phase_1")
