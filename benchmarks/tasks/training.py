"""Training steps of Wan's transformer, beside diffusers' and torch's AdamW.

Flow matching of all parameters on a fixed batch with fixed noise, float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.sides import Side
from benchmarks.tasks import transformer

NEEDS = transformer.NEEDS
_ADAM = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.0}


def request(
  fields: Mapping[str, Any],
  batch: int,
  latents: Sequence[int],
  text_tokens: int = 32,
) -> dict[str, Any]:
  """Returns what both sides take.

  Args:
    fields: the fields of `WanDiT`, of a text-to-video model.
    batch: clips of a step.
    latents: frames, rows and columns of a clip's latents.
    text_tokens: tokens of each text.

  Raises:
    errors.UserError: as `transformer.request`.
  """
  found = transformer.request(fields, latents, text_tokens=text_tokens)
  for name in ("latents", "text"):
    found[name] = [batch, *found[name][1:]]
  return found


def _batch(request: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
  """Returns noisy latents, timesteps, texts and velocities."""
  shape = request["latents"]
  clean, noise, text = inputs.normal(shape, shape, request["text"])
  sigma = np.linspace(0.1, 0.9, shape[0], dtype=np.float32)
  mixed = sigma.reshape(-1, 1, 1, 1, 1)
  noisy = (1 - mixed) * clean + mixed * noise
  return noisy, 1000 * sigma, text, noise - clean


def jax(request: Mapping[str, Any]) -> Side:
  """Builds the module, and compiles a step of loss, gradients and AdamW."""
  import jax
  import jax.numpy as jnp
  import optax

  from dcvideogen_jax.convert import api

  module = api.KINDS["wan_dit"].build(request["fields"])
  params = inputs.params("wan_dit", "diffusers", module, request["shapes"])
  batch = [jnp.asarray(x) for x in _batch(request)]
  optimiser = optax.adamw(
    _ADAM["lr"], eps=_ADAM["eps"], weight_decay=_ADAM["weight_decay"]
  )
  state = jax.jit(lambda p: (p, optimiser.init(p)))(params)

  def loss_of(params, noisy, time, text, velocity):
    found = module.apply({"params": params}, noisy, time, text)
    return jnp.square(found - velocity).mean()

  def step(state, *batch):
    params, moments = state
    loss, grads = jax.value_and_grad(loss_of)(params, *batch)
    updates, moments = optimiser.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), loss

  program, seconds, work = inputs.compiled(
    jax.jit(step, donate_argnums=0), state, *batch
  )
  kept = {"state": state}

  def run():
    kept["state"], loss = program(kept["state"], *batch)
    return np.asarray(loss)

  return Side({"step": run}, seconds, lambda: {"step": work()})


def torch(request: Mapping[str, Any]) -> Side:
  """Builds diffusers' model and torch's AdamW."""
  import torch

  model = transformer.peer(request["config"], request["shapes"], torch.float32)
  model.requires_grad_(True)
  optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), **_ADAM)
  noisy, time, text, velocity = map(torch.from_numpy, _batch(request))
  noisy, velocity = (
    x.movedim(-1, 1).contiguous().float() for x in (noisy, velocity)
  )

  def run():
    (found,) = model(noisy, time.float(), text, return_dict=False)
    loss = (found - velocity).square().mean()
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.detach().numpy()

  return Side({"step": run})
