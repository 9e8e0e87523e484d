"""Transformers as training has them: at random, or from files."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import convert, errors, tree
from dcvideogen_jax.adapt import align, assemble, phases
from dcvideogen_jax.convert import sources
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.ops import attention
from dcvideogen_jax.train import task as task_lib

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_KEYS = {"base", "weights", "patch_embed", "head", "random"}
_HEADS = ("zero", "random")

Init = Callable[[jax.Array], Any]


def build(config: Mapping[str, Any], phase: phases.Phase) -> wan_dit.WanDiT:
  """The transformer of a config; trainable parameters may be of other dtypes.

  Args:
    config: "model", the fields of `WanDiT`; "dtype", of the computation;
      "frozen_dtype", of the parameters that `WanDiT` does not keep in float32;
      where the phase has low-rank updates "lora", their "rank" and "alpha".
    phase: a row of `phases.PHASES`.

  Raises:
    errors.UserError: for a model that cannot be built, or an attention that
      there is not.
  """
  lora = config["lora"] if phase.lora else {"rank": 0, "alpha": 0.0}
  if phase.lora and not lora["rank"] > 0:
    raise errors.UserError(f"lora.rank must be positive, found {lora['rank']}")
  if config["model"].get("attention"):
    attention.require(config["model"]["attention"])
  try:
    return wan_dit.build(
      config["model"],
      dtype=dtype(config, "dtype"),
      param_dtype=dtype(config, "frozen_dtype"),
      lora_rank=lora["rank"],
      lora_alpha=float(lora["alpha"]),
    )
  except (TypeError, ValueError) as e:
    raise errors.UserError(f"config.model: {e}") from e


def dtype(config: Mapping[str, Any], key: str) -> jnp.dtype:
  """The dtype that a config names.

  Raises:
    errors.UserError: for a name that is not in `DTYPES`.
  """
  return errors.choose(key, config[key], DTYPES)


def trainable_in_float32(variables: Any, rules: phases.Rules) -> Any:
  """What trains becomes float32; the rest stays as it is."""
  return jax.tree.map(
    lambda leaf, trains: leaf.astype(jnp.float32) if trains else leaf,
    variables,
    tree.match_tree(rules, variables),
  )


def new_patch_embed(
  rng: jax.Array, module: wan_dit.WanDiT
) -> dict[str, jax.Array]:
  """`align.init_patch_embed` for a model."""
  return align.init_patch_embed(
    rng,
    module.patch,
    module.in_channels,
    module.width,
    latent_channels=module.out_channels,
  )


def init(
  module: wan_dit.WanDiT, start: Mapping[str, Any], rules: phases.Rules
) -> Init:
  """rng -> {"params": ..., "lora": ...}, as the official code starts.

  The patch embedding is as of `align.init_patch_embed`; the output projection
  is zero, and so is the first prediction, unless `start["head"]` is "random".
  """
  example = convert.KINDS["wan_dit"].example(module)

  def random(rng):
    rng, patch = jax.random.split(rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
    variables = dict(module.init(rng, *zeros))
    params = dict(variables["params"])
    params["patch_embed"] = new_patch_embed(patch, module)
    if start["head"] == "zero":
      params["head"] = jax.tree.map(jnp.zeros_like, params["head"])
    variables["params"] = params
    return trainable_in_float32(variables, rules)

  return random


def check_start(start: Mapping[str, Any], name: str) -> None:
  """Whether a phase can start like this.

  Args:
    start: "base" and "weights", directories or files that `convert.load` reads,
      as `phases.Phase.starts` has them; "patch_embed", a file of the first
      phase that `convert.load_part` reads; each None where there is none;
      "head", "zero" or "random", what the output projection starts from where
      it is not copied; "random", True to start from nothing whatever the
      phase, to try things out.
    name: of the phase.

  Raises:
    errors.UserError: if it cannot.
  """
  if set(start) != _KEYS or start["head"] not in _HEADS:
    raise errors.UserError(
      f"start needs the keys {', '.join(sorted(_KEYS))} with a head of "
      f"{' or '.join(_HEADS)}, found {dict(start)}"
    )
  given = [key for key in ("base", "weights") if start[key]]
  allowed = phases.find(name).starts
  fits = len(given) <= 1 and all(key in allowed for key in given)
  if not fits or not (given or start["random"] or "random" in allowed):
    raise errors.UserError(
      f"phase {name} starts from one of {', '.join(allowed)} (config.start), "
      f"found {', '.join(given) or 'none'}"
    )
  if start["patch_embed"] and (name, *given) != ("head", "base"):
    raise errors.UserError(
      "start.patch_embed belongs to phase head, which starts from base; "
      f"found phase {name}"
    )


def load(
  start: Mapping[str, Any],
  module: wan_dit.WanDiT,
  init: Init,
  where: Mapping[str, Any],
  seed: int,
) -> dict[str, Any]:
  """The variables that a phase starts from.

  Args:
    start: as for `check_start`.
    module: the model.
    init: rng -> variables; gives dtypes, and what no weights give.
    where: like the variables, with a `jax.sharding.Sharding` for each.
    seed: of the run, for what starts at random.

  Returns:
    "params", and "lora" if `init` has it, each leaf where it shall be.

  Raises:
    errors.UserError: if weights cannot be read or are another model's.
  """
  same, rng = bool(start["weights"]), task_lib.start_key(seed)
  expected = jax.eval_shape(init, rng)
  shapes = tree.shapes(expected["params"])
  source = start["weights"] or start["base"]
  if not source:
    return drawing(init, tree.names(expected), where)(rng)
  found, variables = convert.load(
    "wan_dit", source, sharding=functools.partial(_where, where["params"])
  )
  assemble.require_compatible(module, found, same)
  params = tree.flatten(variables.pop("params"))
  names = assemble.new_parameters(
    shapes, {name: leaf.shape for name, leaf in params.items()}, same
  )
  others = {key: x for key, x in expected.items() if key != "params"}
  unread = [*(f"params/{n}" for n in names), *tree.names(others)]
  new = drawing(init, unread, where)(rng)
  assembled = assemble.assemble(
    shapes,
    params,
    tree.flatten(new.pop("params", {})),
    start["patch_embed"] and read_patch_embed(start["patch_embed"], module),
  )
  del params
  return place(
    {"params": assembled, **new},
    expected,
    {key: where[key] for key in expected},
  )


def _where(target: Any, abstract: Mapping[str, Any]) -> dict[str, Any]:
  """Shardings of weights that are read: the target's, where it has the same.

  The few others, of patch embedding and head, go to every device.
  """
  by_name = tree.flatten(target)
  anywhere = next(iter(by_name.values()))
  if isinstance(anywhere, NamedSharding):
    anywhere = NamedSharding(anywhere.mesh, P())
  leaves = tree.shapes(abstract["params"])
  found = {
    name: anywhere
    if assemble.for_latent_space(name)
    else by_name.get(name, anywhere)
    for name in leaves
  }
  return {"params": flax.traverse_util.unflatten_dict(found, sep="/")}


def read_patch_embed(
  source: str | os.PathLike[str], module: wan_dit.WanDiT
) -> dict[str, jax.Array]:
  """A patch embedding from a file of the first phase or a whole transformer.

  Nothing else of it is read.

  Returns:
    "kernel" and "bias", as they are stored.

  Raises:
    errors.UserError: if there is none, or another model's.
  """
  tensors = sources.open_source(source, convert.KINDS["wan_dit"].files)
  part = {n: x.read() for n, x in tensors.items() if "patch_embed" in n}
  if not part:
    raise errors.UserError(
      f"{source} holds no patch embedding; of its {len(tensors)} tensors the "
      f"first is {next(iter(tensors), None)}"
    )
  return convert.load_part("wan_dit", part, module)["patch_embed"]


def drawing(
  init: Init, names: Sequence[str], where: Any
) -> Callable[[jax.Array], dict[str, Any]]:
  """Compiled: rng -> the leaves of some names of what `init` gives.

  They are a nested tree, each where `where` says; the others are not made.
  """

  def pick(values):
    leaves = tree.flatten(values)
    found = {name: leaves[name] for name in names}
    return flax.traverse_util.unflatten_dict(found, sep="/")

  return jax.jit(lambda rng: pick(init(rng)), out_shardings=pick(where))


def place(values: Any, expected: Any, where: Any) -> Any:
  """Casts to the dtypes of `expected` and moves to `where`, leaf by leaf."""

  def one(value, like, sharding):
    value = jnp.asarray(value)
    if value.dtype == like.dtype and value.sharding == sharding:
      return value
    cast = jax.jit(lambda x: x.astype(like.dtype), out_shardings=sharding)
    return cast(value)

  return jax.tree.map(one, values, expected, where)
