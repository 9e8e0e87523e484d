"""Settings of sampling in a few steps: published presets, and models' own.

A model's directory may hold a few-step LoRA of its own, in `few_t2v` or
`few_i2v`: an adapter that `convert.load_lora` reads, and the `few.json` of
`diffusion.few`.
"""

import os
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import few

# Fields of a sampling config that few steps settle.
SETTLED = ("steps", "solver", "grid", "shift", "levels", "guidance_scale")


class Choice(NamedTuple):
  """Few steps, as a config or a flag chooses them.

  Attributes:
    name: a key of `few.PRESETS`; "own" for a model's own.
    steps: how to sample.
    lora: directory of the model's own LoRA; None with a preset.
  """

  name: str
  steps: few.FewSteps
  lora: pathlib.Path | None = None

  def told(self) -> str:
    """Returns a line that says what the steps belong to."""
    count = len(self.steps.levels)
    return (
      f"few={self.name}: {count} evaluations, {self.steps.solver}, without"
      f" guidance, for {self.steps.weights}"
    )


def preset(name: str) -> Choice:
  """Returns the published preset of this name.

  Raises:
    errors.UserError: for an unknown name.
  """
  return Choice(name, errors.choose("config.few", name, few.PRESETS))


def own(source: str | os.PathLike[str], task: str) -> Choice:
  """Returns the few steps of a model that brings a LoRA for them.

  Args:
    source: directory or repository of the model.
    task: "t2v" or "i2v".

  Raises:
    errors.UserError: if the model has none, or its file is damaged.
  """
  found = pathlib.Path(source) / f"few_{task}"
  if not found.is_dir():
    raise errors.UserError(
      f"{source} has no few-step LoRA for {task}: name one with --lora, and how"
      f" it is sampled with --config.few={' or '.join(few.PRESETS)}"
    )
  return Choice("own", few.read(found), found)


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
