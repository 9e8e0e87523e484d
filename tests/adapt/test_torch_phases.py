"""Each phase trains as torch, diffusers and PEFT do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcvideogen_jax import convert, tree
from dcvideogen_jax.train import align, denoise, optim
from tests.adapt import runs, tiny_models, torch_peer

pytestmark = pytest.mark.parity

STEPS = 3
# The official values, except for the numbers of steps.
OPTIMISERS = {
  "embed": {"lr": 2e-4, "betas": (0.9, 0.9), "clip": 0.0, "warmup": 0},
  "head": {"lr": 1e-4, "betas": (0.9, 0.999), "clip": 0.1, "warmup": 0},
  "lora": {"lr": 5e-5, "betas": (0.9, 0.999), "clip": 0.1, "warmup": 2},
}
OPTIMISERS["full"] = OPTIMISERS["lora"]
COMMON = {
  "name": "adamw",
  "schedule": "constant",
  "final": 1.0,
  "eps": 1e-8,
  "decay": 0.0,
  "decay_mask": ((".*", False),),
}
# diffusers takes all tokens before the last 512 as those of the image.
TEXT = {"t2v": 5, "i2v": 512}


def start(task, seed, head):
  """Returns random variables; those that start as zero are zero."""
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  variables = tiny_models.random(abstract, seed)
  zero = {"params/head/kernel", "params/head/bias"} if head == "zero" else set()
  leaves = {
    name: jnp.zeros_like(x)
    if name in zero or (head == "zero" and name.endswith("/b"))
    else x
    for name, x in tree.flatten(variables).items()
  }
  return jax.tree.unflatten(jax.tree.structure(variables), leaves.values())


def ours(task, variables, drawn, optimiser):
  """Trains as `torch_peer.train` does; parameters have this project's names."""
  mask = tree.match_tree(task.trainable, variables)
  params, frozen = tree.split(variables, mask)
  transform = optim.build(optimiser, STEPS)

  @jax.jit
  def step(params, state, batch):
    loss, grads = jax.value_and_grad(
      lambda p: task.loss_fn(tree.merge(p, frozen), batch)[0]
    )(params)
    updates, state = transform.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, grads

  first, state, losses, gradients = params, transform.init(params), [], None
  for batch in drawn:
    params, state, loss, grads = step(params, state, batch)
    losses.append(float(loss))
    gradients = grads if gradients is None else gradients
  change = jax.tree.map(
    lambda a, b: np.asarray(a, np.float64) - np.asarray(b), params, first
  )
  return losses, gradients, change


def renamed(module, trained):
  """Returns the trained parameters by torch's names."""
  found = {}
  if "lora" in trained:
    found |= torch_peer.updates(trained["lora"], module.layers)
  abstract = tiny_models.abstract(module)["params"]
  whole = tree.flatten(trained["params"])
  filled = {
    name: np.asarray(whole.get(name, np.full(x.shape, np.nan)))
    for name, x in tree.flatten(abstract).items()
  }
  nested = jax.tree.unflatten(jax.tree.structure(abstract), filled.values())
  plain = module.clone(lora_rank=0)
  tensors = convert.to_torch("wan_dit", plain, {"params": nested})
  return found | {n: x for n, x in tensors.items() if not np.isnan(x).any()}


def assert_close(found, expected, tolerance):
  """Asserts closeness relative to the largest value of all arrays."""
  assert found.keys() == expected.keys()
  largest = max(np.abs(x).max() for x in expected.values())
  assert largest > 0
  for name, x in expected.items():
    np.testing.assert_allclose(
      found[name], x, rtol=0, atol=tolerance * largest, err_msg=name
    )


def peer_of(phase, kind, variables):
  """Returns the module and the same phase in torch."""
  module = tiny_models.module(f"deep_{kind}")
  if phase == "embed":
    return module, torch_peer.Aligner(
      variables["params"]["patch_embed"],
      variables["teacher"]["patch_embed"],
      kind == "i2v",
    )
  if phase == "lora":
    module = module.clone(lora_rank=3, lora_alpha=6.0)
  return module, torch_peer.Denoiser(
    module, variables["params"], phase, variables.get("lora")
  )


@pytest.mark.parametrize(
  ("phase", "kind", "head", "draw"),
  [
    ("embed", "t2v", "zero", "uniform"),
    ("embed", "i2v", "zero", "uniform"),
    ("head", "t2v", "zero", "uniform"),
    ("head", "i2v", "random", "official"),
    ("lora", "t2v", "zero", "uniform"),
    ("lora", "i2v", "random", "official"),
    ("full", "t2v", "random", "shifted"),
  ],
)
def test_trains_as_torch_does(phase, kind, head, draw, tmp_path):
  rng = np.random.default_rng(0)
  negative = rng.normal(size=(TEXT[kind], 12)).astype(np.float32)
  np.save(tmp_path / "negative.npy", negative)
  config = runs.config(
    phase,
    kind,
    text_dropout=0.4,
    negative=str(tmp_path / "negative.npy"),
    levels={"draw": draw, "shift": 5.0, "weighted": True},
  )
  task = (align.align if phase == "embed" else denoise.denoise)(config)
  variables = start(task, seed=1, head=head)
  if "negative" in variables:
    variables["negative"] = {"text": jnp.asarray(negative)}
  drawn = [
    jax.device_get(task.draw(batch, jax.random.key(10 + i)))
    for i, batch in enumerate(
      runs.batch(4, kind, TEXT[kind], seed=i) for i in range(STEPS)
    )
  ]
  optimiser = COMMON | OPTIMISERS[phase]
  module, peer = peer_of(phase, kind, variables)
  losses, gradients, changes = torch_peer.train(
    peer, drawn, negative, optimiser, rates(optimiser)
  )
  found, grads, change = ours(task, variables, drawn, optimiser)
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  assert_close(renamed(module, grads), gradients, 1e-5)
  assert_close(renamed(module, change), changes, 1e-3)


def rates(optimiser):
  schedule = optim.learning_rate(optimiser, STEPS)
  return [float(schedule(i)) for i in range(STEPS)]
