"""Settings of sampling in a few steps: published presets, and models' own.

A model's directory may hold a few-step LoRA of its own, in `few_t2v` or
`few_i2v`, and for streams in `few_t2v_stream` or `few_i2v_stream`: an adapter
that `convert.load_lora` reads, and the `few.json` of `diffusion.few`.
"""

import os
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import few

# Fields of a sampling config that few steps settle.
SETTLED = ("steps", "solver", "grid", "shift", "levels", "guidance_scale")


class Choice(NamedTuple):
  """Few steps, as a config or a flag chooses them.

  Attributes:
    name: a key of `few.PRESETS`; "own" for a model's own; "given" for a LoRA
      that the user names.
    steps: how to sample.
    lora: directory of the model's own LoRA; None otherwise.
  """

  name: str
  steps: few.FewSteps
  lora: pathlib.Path | None = None

  def told(self) -> str:
    """Returns a line that says what the steps belong to."""
    levels, solver, weights, chunk = self.steps
    each = "" if chunk is None else f" for each chunk of {chunk} latent frames"
    return (
      f"few={self.name}: {len(levels)} evaluations{each}, {solver}, without"
      f" guidance, for {weights}"
    )


def preset(name: str) -> Choice:
  """Returns the published preset of this name.

  Raises:
    errors.UserError: for an unknown name.
  """
  return Choice(name, errors.choose("config.few", name, few.PRESETS))


def own(
  source: str | os.PathLike[str], task: str, stream: bool = False
) -> Choice:
  """Returns the few steps of a model that brings a LoRA for them.

  Args:
    source: directory or repository of the model.
    task: "t2v" or "i2v".
    stream: whether to make streams, not whole clips.

  Raises:
    errors.UserError: if the model has none, its file is damaged, or `require`
      refuses it.
  """
  found = pathlib.Path(source) / f"few_{task}{'_stream' if stream else ''}"
  if not found.is_dir():
    what = f"streams of {task}" if stream else task
    raise errors.UserError(
      f"{source} has no few-step LoRA for {what}: name one with --lora, and how"
      f" it is sampled with --config.few={' or '.join(few.PRESETS)}"
    )
  choice = Choice("own", few.read(found), found)
  require(choice, stream)
  return choice


def given(
  loras: Sequence[str | os.PathLike[str]], stream: bool = False
) -> Choice | None:
  """Returns the few steps of the LoRA that a `few.json` lies beside, or None.

  Args:
    loras: files and directories of LoRA.
    stream: as for `own`.

  Raises:
    errors.UserError: if several have few steps, a `few.json` is damaged, or
      `require` refuses it.
  """
  with_steps = [x for x in loras if (pathlib.Path(x) / few.FILE).is_file()]
  if not with_steps:
    return None
  if len(with_steps) > 1:
    raise errors.UserError(
      "--few takes one few-step LoRA, found "
      + " and ".join(map(str, with_steps))
    )
  choice = Choice("given", few.read(with_steps[0]))
  require(choice, stream)
  return choice


def require(choice: Choice, stream: bool) -> None:
  """Checks that a LoRA was distilled for streams, or else for whole clips.

  Raises:
    errors.UserError: if it was not.
  """
  chunk, weights = choice.steps.chunk, choice.steps.weights
  if chunk is not None and not stream:
    raise errors.UserError(
      f"{weights} was distilled for streams in chunks of {chunk} latent frames:"
      " use it with `dcvideogen stream`"
    )
  if chunk is None and stream:
    raise errors.UserError(
      f"{weights} was distilled for whole clips, not for streams: use it with"
      " `dcvideogen sample`"
    )


def chunk(choice: Choice | None, asked: int | None) -> int | None:
  """Returns the chunk of a stream, in latent frames; None is the model's own.

  Args:
    choice: the few steps of the stream; None without few steps.
    asked: the chunk that the user asks for, or None.

  Raises:
    errors.UserError: for another chunk than the LoRA was distilled for.
  """
  own = None if choice is None else choice.steps.chunk
  if None not in (own, asked) and own != asked:
    assert choice is not None
    raise errors.UserError(
      f"{choice.steps.weights} was distilled for chunks of {own} latent frames,"
      f" found --chunk={asked}"
    )
  return asked if own is None else own


def settle(c: Any, choice: Choice, given: Collection[str]) -> None:
  """Sets the fields of a sampling config that few steps settle.

  Args:
    c: the config, which changes.
    choice: the few steps.
    given: names of the fields that the user has set.

  Raises:
    errors.UserError: for a field that few steps settle.
  """
  if wrong := [name for name in SETTLED if name in given]:
    raise errors.UserError(
      f"few={choice.name} settles {', '.join(SETTLED)}: it does not go together"
      f" with --config.{wrong[0]}"
    )
  c.few = choice.name
  c.levels, c.solver = choice.steps.levels, choice.steps.solver
  c.steps, c.guidance_scale = len(choice.steps.levels), 1.0


def brings(source: str | os.PathLike[str], task: str) -> bool:
  """Returns whether `own` finds a few-step LoRA in a model's directory."""
  return (pathlib.Path(source) / f"few_{task}").is_dir()
