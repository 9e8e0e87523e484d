"""The cases that `make gpu` compiles and times: one generator per part."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.gpu.cases import Case, shape
from dcvideogen_jax import flops, tree
from dcvideogen_jax.adapt import phases
from dcvideogen_jax.diffusion import flow, training
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.ops import attention, conv3d
from dcvideogen_jax.ops.attention import masks
from dcvideogen_jax.train import optim

# The transformer of 1.3B in DC-AE-V's latents, and one alike but tiny.
LARGE = wan_dit.VARIANTS["dc-wan2.1-t2v-1.3b"]
SMALL = {**LARGE, "layers": 2, "width": 32, "heads": 2, "ffn_width": 48}
SMALL |= {"text_width": 16, "frequencies": 16}
# 80 frames of 480x832 and of 704x1280 pixels, encoded by f32t4c32.
LATENTS = {7800: (20, 15, 26), 17600: (20, 22, 40)}
TEXT_TOKENS = 512

# Rank, alpha and optimiser of the phase "lora" in `configs/adapt.py`.
LORA = {"lora_rank": 256, "lora_alpha": 512.0}
OPTIM: Mapping[str, Any] = {
  "name": "adamw",
  "lr": 5e-5,
  "warmup": 1000,
  "schedule": "constant",
  "final": 0.01,
  "betas": (0.9, 0.999),
  "eps": 1e-8,
  "clip": 0.1,
  "decay": 0.0,
  "decay_mask": ((".*/kernel", True), (".*", False)),
  "lr_scale": ((".*", 1.0),),
}
LEVELS = {"draw": "uniform", "shift": 8.0, "weighted": True}


def machine(toy: bool) -> Iterator[Case]:
  """The rates that the device reaches in products, copies, convolutions."""
  n = 64 if toy else 8192
  for dtype in ("bfloat16", "float32"):
    yield Case(
      f"matrix product {n}^3, {dtype}",
      jnp.matmul,
      (shape(n, n, dtype=dtype),) * 2,
      dtype,
    )
  large = shape(2**16 if toy else 2**30)
  yield Case("copy", lambda x: -x, (large,), moved=2 * 2 * large.size)
  # Two of the widest convolutions of f32t4c32 for 704x1280, and a coarse one.
  shapes = ((40, 88, 160, 512), (40, 176, 320, 512), (40, 22, 40, 1024))
  for frames, rows, columns, c in ((4, 4, 8, 8),) if toy else shapes:
    yield Case(
      f"conv3d {frames}x{rows}x{columns}, {c} channels",
      functools.partial(conv3d.conv3d, padding=((1, 1),) * 3),
      (shape(1, frames, rows, columns, c), shape(3, 3, 3, c, c)),
      useful=2 * 27 * frames * rows * columns * c * c,
    )


def attentions(toy: bool, platform: str) -> Iterator[Case]:
  """Attention of Wan 14B's shape, dense and block-causal, forward and both."""
  tokens, heads, width = (128, 2, 32) if toy else (17600, 40, 128)
  half = jnp.bfloat16
  x = shape(1, tokens, heads, width, dtype=half)
  dense = ("cudnn",) if platform == "gpu" else ("reference",)
  order = ((2, ("by_chunks", "pallas")), (1, (*dense, "pallas")))
  order += ((20, ("by_chunks", "pallas")), (2, ("chunked",)))
  for blocks, names in order:
    mask = attention.BlockCausal(-(-tokens // blocks)) if blocks > 1 else None
    pairs = masks.area(mask, tokens, tokens)
    for name in names:
      for backward in (False, True):
        what = "dense" if mask is None else f"{blocks} chunks"
        yield Case(
          f"{name}, {what}, {'both' if backward else 'forward'}",
          functools.partial(_attend, name, mask, backward),
          (x,) * (4 if backward else 3),
          useful=(7 if backward else 2) * 2 * pairs * heads * width,
        )


def _attend(name, mask, backward, q, k, v, *dout):
  def attend(q, k, v):
    return attention.attention(q, k, v, mask=mask, implementation=name)

  return jax.vjp(attend, q, k, v)[1](*dout) if backward else attend(q, k, v)


def steps(toy: bool) -> Iterator[Case]:
  """A pass of the transformer, in bfloat16 and with kernels in int8."""
  for tokens, latents in ({30: (2, 3, 5)} if toy else LATENTS).items():
    for weights in (None, "int8"):
      module, variables = _transformer(toy, weights=weights)
      yield Case(
        f"{tokens} tokens, {weights or 'bfloat16'}",
        module.apply,
        (variables, *_inputs(module, 1, latents)),
      )


def trainings(toy: bool) -> Iterator[Case]:
  """A step of the phase "lora": loss, gradients, AdamW; see `training_step`."""
  fields = {**LORA, "remat": "full"}
  if toy:
    fields |= {"lora_rank": 4}
  module, variables = _transformer(toy, **fields)
  for tokens in (30,) if toy else (7800,):
    latents = LATENTS.get(tokens, (2, 3, 5))
    step, state = training_step(module, variables)
    yield Case(
      f"phase lora, one clip of {tokens} tokens",
      step,
      (state, *_batch(module, 1, latents)),
      useful=_useful(module, variables, latents),
      feeds=True,
    )


def _transformer(toy: bool, **fields: Any) -> tuple[wan_dit.WanDiT, Any]:
  """Returns the module in bfloat16 and the shapes of its variables."""
  half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
  module = wan_dit.build(SMALL if toy else LARGE, **half, **fields)
  inputs = _inputs(module, 1, (1, 1, 1))
  return module, jax.eval_shape(module.init, jax.random.key(0), *inputs)


def _inputs(
  module: wan_dit.WanDiT, batch: int, latents: Any
) -> tuple[Any, ...]:
  tokens = 8 if module.text_width == SMALL["text_width"] else TEXT_TOKENS
  return (
    shape(batch, *latents, module.in_channels, dtype=jnp.float32),
    shape(batch, dtype=jnp.float32),
    shape(batch, tokens, module.text_width),
  )


def _batch(module: wan_dit.WanDiT, batch: int, latents: Any) -> tuple[Any, ...]:
  x, _, text = _inputs(module, batch, latents)
  return x, shape(*text.shape, dtype=jnp.float32)


def _useful(module, variables, latents) -> int:
  """Counts the FLOPs of a training step without rematerialisation."""
  step, state = training_step(module.clone(remat=None), variables)
  traced = jax.jit(step).trace(state, *_batch(module, 1, latents))
  return flops.count(traced.jaxpr.jaxpr)


def training_step(module: wan_dit.WanDiT, variables: Any) -> tuple[Any, Any]:
  """Builds the step of the phase "lora", as `train.step` runs it.

  The trainer itself reads clips, for which it needs packages that a GPU machine
  may lack. Here the batch is given, and no text is dropped.

  Args:
    module: a transformer with low-rank updates.
    variables: the shapes of its variables.

  Returns:
    The function (state, latents, text) -> (state, metrics), and the shapes of
    its state: trainable variables in float32, those that are frozen, the
    optimiser's state, and the number of the step.
  """
  rules = phases.find("lora").trainable
  mask = tree.match_tree(rules, variables)
  trained, frozen = tree.split(variables, mask)
  trained = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained
  )
  optimiser = optim.build(OPTIM, 40_000)
  opt = jax.eval_shape(optimiser.init, trained)
  state = {"trained": trained, "frozen": frozen, "opt": opt}
  state["step"] = shape(dtype=jnp.int32)

  def step(state, latents, text):
    level, noise = jax.random.split(
      jax.random.fold_in(jax.random.key(0), state["step"])
    )
    levels = training.levels(level, len(latents), LEVELS)
    drawn = jax.random.normal(noise, latents.shape, jnp.float32)

    def loss_of(trained):
      v = module.apply(
        tree.merge(trained, state["frozen"]),
        flow.add_noise(latents, drawn, levels.sigma),
        levels.timestep,
        text,
      )
      error = training.squared_error(v, latents, drawn)
      return (levels.weight * error).mean()

    loss, grads = jax.value_and_grad(loss_of)(state["trained"])
    updates, opt = optimiser.update(grads, state["opt"], state["trained"])
    new = {
      **state,
      "trained": optax.apply_updates(state["trained"], updates),
      "opt": opt,
      "step": state["step"] + 1,
    }
    return new, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

  return step, state
