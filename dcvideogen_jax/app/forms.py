"""What the page asks for, as a config, as requests and as a command line."""

import copy
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.sample import (
  few_steps,
  model_names,
  presets,
  request_list,
  settings,
)

# Ways to denoise -> flags of `dcvideogen sample`: the solver's steps, or the
# few steps of a LoRA.
WAYS: Mapping[str, tuple[str, ...]] = {"steps": (), "few": ("--few",)}

_TASKS = {"t2v": "text to video", "i2v": "image to video"}
_LINE = 60  # Characters of a line of a command, which the page does not wrap.
# Noise levels are computed as the form changes, so that a slip of the finger
# must not ask for millions.
_MOST_STEPS = 10_000


class Served(NamedTuple):
  """The model that the page was started with.

  Attributes:
    config: name of a preset, such as "tiny".
    flags: further flags of `dcvideogen sample`, such as "--model=DIR".
    output: directory of the videos.
    model: of --model; None is that of the preset.
    loras: of --lora, which `flags` leaves out.
  """

  config: str
  flags: tuple[str, ...]
  output: str
  model: str | None = None
  loras: tuple[str, ...] = ()


class Form(NamedTuple):
  """The fields of the page.

  Attributes:
    prompt: the text.
    negative_prompt: "" is the model's own.
    frames, height, width: of the video; None if a field is empty.
    steps: of the solver; without effect where the way settles it.
    guidance_scale: 1 is none; likewise.
    seeds: whole numbers, separated by commas.
    way: a key of `WAYS`.
    image: name of the file with the first frame; "" for text to video.
  """

  prompt: str
  negative_prompt: str
  frames: Any
  height: Any
  width: Any
  steps: Any
  guidance_scale: Any
  seeds: str
  way: str = "steps"
  image: str = ""


def base(served: Served) -> Any:
  """Returns the config that the page begins with."""
  return presets.get_config(served.config)


def config(served: Served, form: Form) -> Any:
  """Returns the config that a form describes.

  Raises:
    errors.UserError: names the field that does not fit.
  """
  c = copy.deepcopy(base(served))
  for name, value in _changes(served, form).items():
    try:
      c[name] = value
    except TypeError as e:
      raise errors.UserError(f"{name} must be a number, found {value!r}") from e
  if form.image:
    c.task = "i2v"
  if form.way == "few":
    few_steps.settle(c, few(served, c.task), given=())
  if c.steps is not None and c.steps > _MOST_STEPS:
    raise errors.UserError(
      f"steps must be at most {_MOST_STEPS}, found {c.steps}"
    )
  settings.check(c)
  return c


def few(served: Served, task: str) -> few_steps.Choice:
  """Returns the few steps of the LoRA that is given, or that the model brings.

  Raises:
    errors.UserError: if there are none, if their file is damaged, or if they
      are those of streams.
  """
  paths = [model_names.lora(text).path for text in served.loras]
  if choice := few_steps.given(paths):
    return choice
  name = served.model or base(served).model
  source = model_names.pipeline(name)
  if not few_steps.brings(source, task):
    raise errors.UserError(
      f"{name} brings no few-step LoRA for {_TASKS[task]}: choose steps"
    )
  return few_steps.own(source, task)


def ways(served: Served) -> list[tuple[str, str]]:
  """Returns what the page calls each way, and the way."""
  try:
    count = len(few(served, base(served).task).steps.levels)
    shown = {
      "few": "few: 1 evaluation" if count == 1 else f"few: {count} evaluations"
    }
  except errors.UserError:  # It is told to whoever chooses the way.
    shown = {}
  return [(shown.get(way, way), way) for way in WAYS]


def requests(form: Form, task: str) -> list[request_list.Request]:
  """Returns a request for each seed.

  Raises:
    errors.UserError: as `request_list.gather`; also for an empty prompt.
  """
  if not form.prompt.strip():
    raise errors.UserError("The prompt is empty: say what the video shows.")
  seeds = [part.strip() for part in str(form.seeds).split(",")]
  found = request_list.gather([form.prompt], None, seeds, None, None)
  request_list.check(found, task, image=not form.image)
  return found


def command(served: Served, form: Form) -> str:
  """Returns the command line that makes the same videos."""
  words = ["dcvideogen", "sample"]
  words += [f"--config={served.config}", *served.flags]
  words += [*(f"--lora={text}" for text in served.loras), *WAYS[form.way]]
  for name, value in _changes(served, form).items():
    words.append(f"--{'' if name == 'frames' else 'config.'}{name}={value}")
  words.append(f"--prompt={form.prompt}")
  if form.image:
    words.append(f"--image={form.image}")
  words += [f"--seeds={str(form.seeds).replace(' ', '')}", "--output=out"]
  return joined(words)


def reconstruct_command(
  model: str, video: str, options: Mapping[str, Any]
) -> str:
  """Returns the command line that reconstructs the same video.

  Args:
    model: of `dcvideogen reconstruct`.
    video: name of the input.
    options: further flags; those that are None are left out.
  """
  words = ["dcvideogen", "reconstruct", f"--model={model}", f"--input={video}"]
  words += [f"--{k}={v}" for k, v in options.items() if v is not None]
  return joined([*words, "--output=out"])


def joined(words: Sequence[str]) -> str:
  """Joins words to a command line, quoted for a shell, in lines of flags."""
  lines, line = [], ""
  for word in map(_quoted, words):
    if line and len(line) + len(word) > _LINE:
      lines.append(line)
      line = " "
    line += f" {word}" if line else word
  return " \\\n".join([*lines, line])


def _quoted(word: str) -> str:
  """Quotes a word, and of a flag the value only."""
  flag, equals, value = word.partition("=")
  if word.startswith("--") and equals and flag == shlex.quote(flag):
    return f"{flag}={shlex.quote(value)}"
  return shlex.quote(word)


def _changes(served: Served, form: Form) -> dict[str, Any]:
  """Returns the fields of the config that differ from those of the preset."""
  asked = {
    "frames": _whole(form.frames),
    "height": _whole(form.height),
    "width": _whole(form.width),
    "steps": _whole(form.steps),
    "guidance_scale": form.guidance_scale,
    "negative_prompt": form.negative_prompt or None,
  }
  if errors.choose("way", form.way, WAYS):
    asked = {k: x for k, x in asked.items() if k not in few_steps.SETTLED}
  c = base(served)
  return {name: x for name, x in asked.items() if x != c[name]}


def _whole(value: Any) -> Any:
  """Returns 16 for 16.0, as browsers send it; other values as they are."""
  return (
    int(value) if isinstance(value, float) and value == int(value) else value
  )
