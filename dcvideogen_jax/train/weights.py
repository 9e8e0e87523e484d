"""Builds transformers for training, and their weights: random or from files."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from dcvideogen_jax import convert, errors, tree
from dcvideogen_jax.adapt import align, assemble, phases
from dcvideogen_jax.convert import sources
from dcvideogen_jax.models import eight_bits, wan_dit
from dcvideogen_jax.ops import attention
from dcvideogen_jax.train import task as task_lib

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_KEYS = {"base", "weights", "patch_embed", "head", "random"}
_HEADS = ("zero", "random")

Init = Callable[[jax.Array], Any]


def build(config: Mapping[str, Any], phase: phases.Phase) -> wan_dit.WanDiT:
  """Builds the transformer of a config.

  Its `param_dtype` is that of the frozen parameters; `init` makes trainable
  ones float32.

  Args:
    config: "model", the fields of `WanDiT`; "dtype", that of the computation;
      "frozen_dtype", that of the frozen parameters which `WanDiT` does not keep
      in float32; "weights", the format of the frozen kernels of blocks, as in
      `WanDiT`, or None; "lora", the "rank" and "alpha" of low-rank updates, if
      the phase has any.
    phase: a row of `phases.PHASES`.

  Raises:
    errors.UserError: for a model that cannot be built, or an unknown kind of
      attention.
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
      weights=config.get("weights"),
      lora_rank=lora["rank"],
      lora_alpha=float(lora["alpha"]),
    )
  except (TypeError, ValueError) as e:
    raise errors.UserError(f"config.model: {e}") from e


def dtype(config: Mapping[str, Any], key: str) -> DTypeLike:
  """Returns the dtype that a config names.

  Raises:
    errors.UserError: for a name that is not in `DTYPES`.
  """
  return errors.choose(key, config[key], DTYPES)


def trainable_in_float32(variables: Any, rules: phases.Rules) -> Any:
  """Casts trainable variables to float32; frozen ones keep their dtypes.

  Raises:
    errors.UserError: if variables in eight bits would train.
  """
  trains = tree.flatten(tree.match_tree(rules, variables))
  for name, leaf in tree.flatten(variables).items():
    if trains[name] and eight_bits.is_stored(leaf.dtype):
      raise errors.UserError(
        f"{name} is in {eight_bits.format_of(leaf.dtype)} and would train:"
        " expected config.weights unset in a phase that trains the blocks"
      )
  return jax.tree.map(
    lambda leaf, trains: leaf.astype(jnp.float32) if trains else leaf,
    variables,
    tree.match_tree(rules, variables),
  )


def new_patch_embed(
  rng: jax.Array, module: wan_dit.WanDiT
) -> dict[str, jax.Array]:
  """Applies `align.init_patch_embed` with the sizes of a model."""
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
  """Returns rng -> {"params": ..., "lora": ...}, as the official code starts.

  The patch embedding is that of `align.init_patch_embed`. The output
  projection, and with it the first prediction, is zero unless `start["head"]`
  is "random".

  Args:
    module: the model.
    start: as for `check_start`.
    rules: which variables train, and therefore are float32.
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
  """Checks that a phase can start from the given weights.

  Args:
    start: "base" and "weights", directories or files that `convert.load` reads
      (see `phases.Phase.starts`), or None; "patch_embed", a file of the first
      phase that `convert.load_part` reads, or None; "head", "zero" or "random",
      the initial output projection where it is not copied; "random", True to
      let any phase start from random weights, to try things out.
    name: of the phase.

  Raises:
    errors.UserError: if the phase cannot start like this.
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
  """Loads the variables that a phase starts from.

  Args:
    start: as for `check_start`.
    module: the model.
    init: rng -> variables; gives the dtypes, and the leaves that no file holds.
    where: a tree like the variables, with a `jax.sharding.Sharding` per leaf.
    seed: of the run, for leaves that start at random.

  Returns:
    "params", and "lora" if `init` gives it, each leaf sharded as in `where`.

  Raises:
    errors.UserError: if weights cannot be read or are those of another model.
  """
  same, rng = bool(start["weights"]), task_lib.start_key(seed)
  expected = jax.eval_shape(init, rng)
  shapes = tree.shapes(expected["params"])
  source = start["weights"] or start["base"]
  if not source:
    return drawing(init, tree.names(expected), where)(rng)
  found, variables = convert.load(
    "wan_dit",
    source,
    sharding=functools.partial(_where, where["params"]),
    weights=module.weights or "bfloat16",
  )
  if found.chunk is not None and module.chunk is None:
    raise errors.UserError(
      f"{source} is block-causal, in chunks of {found.chunk}: expected weights"
      " of whole clips, or a config.model.chunk"
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
  """Chooses the shardings of weights to read: the target's, by name.

  The few leaves of patch embedding and head, whose shapes may differ, are
  replicated.
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
  """Reads a patch embedding from a file of the first phase or a transformer.

  No other tensor of the file is read.

  Returns:
    "kernel" and "bias", in the dtypes in which they are stored.

  Raises:
    errors.UserError: if the file holds no patch embedding, or that of another
      model.
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
  """Returns jitted rng -> the named leaves of the variables of `init`.

  The leaves form a nested tree; other leaves are not computed.

  Args:
    init: rng -> variables.
    names: of the leaves to keep, with "/" between the levels.
    where: a tree of shardings like the variables.
  """

  def pick(values):
    leaves = tree.flatten(values)
    found = {name: leaves[name] for name in names}
    return flax.traverse_util.unflatten_dict(found, sep="/")

  return jax.jit(lambda rng: pick(init(rng)), out_shardings=pick(where))


def place(values: Any, expected: Any, where: Any) -> Any:
  """Casts arrays and moves them to their devices, leaf by leaf.

  Args:
    values: a tree of arrays.
    expected: a tree like it, whose leaves have the dtypes to cast to.
    where: a tree like it of the shardings to move to.
  """

  def one(value, like, sharding):
    value = jnp.asarray(value)
    if value.dtype == like.dtype and value.sharding == sharding:
      return value
    cast = jax.jit(lambda x: x.astype(like.dtype), out_shardings=sharding)
    return cast(value)

  return jax.tree.map(one, values, expected, where)
