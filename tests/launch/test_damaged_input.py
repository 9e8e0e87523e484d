"""Programs refuse damaged files in one line, and leave nothing half-written.

What the readers make of hundreds of damaged files is seen in `tests/damage`;
here a few of each kind go the whole way.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.damage import inputs
from tests.launch import launching
from tests.launch.test_bad_input import require_one_sentence


class Case(NamedTuple):
  """A program, and what it is given.

  Attributes:
    program: a module of `launch`.
    flags: where {input} stands for the damaged directory, {model} for a whole
      autoencoder and {output} for where the result would be.
    given: name of one of `inputs.INPUTS`.
    damage: changes one file of it.
    word: that the sentence has.
  """

  program: str
  flags: str
  given: str
  damage: Callable[[Any], None]
  word: str


def cut(path):
  """The last third of it is lost."""
  path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def nested(path):
  """A value is lists within lists within lists."""
  text = path.read_text()
  place = text.rindex(":") + 1
  deep = "[" * 100_000 + "]" * 100_000
  path.write_text(f"{text[:place]}{deep}{text[place:].lstrip(' 0123456789')}")


def noise(path):
  """Every third byte after the first half is another one."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2 :: 3] = bytes(
    x ^ 0x5A for x in content[len(content) // 2 :: 3]
  )
  path.write_bytes(content)


def field(*keys, value):
  """Sets a field of a JSON file."""

  def damage(path):
    document = holder = json.loads(path.read_text())
    for key in keys[:-1]:
      holder = holder[key]
    holder[keys[-1]] = value
    path.write_text(json.dumps(document))

  return damage


def offsets(path):
  """A tensor begins before the data."""
  content = path.read_bytes()
  length = int.from_bytes(content[:8], "little")
  header = json.loads(content[8 : 8 + length])
  entry = header[next(name for name in header if name != "__metadata__")]
  first, last = entry["data_offsets"]
  entry["data_offsets"] = [first - last, 0]
  text = json.dumps(header).encode()
  path.write_bytes(
    len(text).to_bytes(8, "little") + text + content[8 + length :]
  )


def surrogate(path):
  """A text has half of a character."""
  path.write_bytes(path.read_bytes() + b'{"prompt": "\\ud800 cat"}\n')


_CONVERT = "--source={input} --output={output}"
_RECONSTRUCT = "--model={model} --output={output} --input={input}/"
_SAMPLE = "--output={output} --config.steps=1 --config.frames=4"
_ADAPTER = f"{_SAMPLE} --model=tiny --prompt=cat --lora={{input}}"
_TRAIN = (
  f"--workdir={{output}} --config={launching.ROOT}/configs/tiny.py:autoencoder,"
  "runlocal --config.data.source=records --config.data.path={input}/clips"
)
_EXPORT = "--workdir={input}/run --output={output}"

CASES = (
  Case("convert", _CONVERT, "autoencoder weights", offsets, "safetensors"),
  Case("convert", _CONVERT, "autoencoder config", nested, "config.json"),
  Case(
    "convert",
    f"{_CONVERT} --kind=wan_dit",
    "transformer index",
    field("weight_map", "proj_out.bias", value="../../passwd"),
    "index.json",
  ),
  Case(
    "convert",
    f"{_CONVERT} --kind=wan_dit",
    "transformer config",
    field("patch_size", value=[0, 2, 2]),
    "input: the configuration of wan_dit: patch[0] is 0",
  ),
  Case(
    "convert",
    "--source={input}/dc-ae-v.pt --output={output}.safetensors",
    "autoencoder .pt",
    cut,
    "dc-ae-v.pt",
  ),
  Case(
    "sample",
    f"{_SAMPLE} --model={{input}} --prompt=cat",
    "parts.json",
    nested,
    "parts.json",
  ),
  Case(
    "sample",
    f"{_SAMPLE} --model={{input}} --prompt=cat",
    "scheduler",
    field("flow_shift", value=math.nan),
    "scheduler_config.json",
  ),
  Case(
    "sample",
    f"{_SAMPLE} --model={{input}} --prompt=cat",
    "tokenizer",
    cut,
    "tokenizer.json",
  ),
  Case(
    "sample",
    f"{_SAMPLE} --model=tiny --prompts={{input}}/prompts.jsonl",
    "prompts .jsonl",
    surrogate,
    "prompts.jsonl",
  ),
  Case(
    "sample",
    _ADAPTER,
    "PEFT's config",
    field("lora_alpha", value=math.nan),
    "adapter_config.json",
  ),
  Case("sample", _ADAPTER, "PEFT", cut, "adapter_model.safetensors"),
  Case("reconstruct", f"{_RECONSTRUCT}clip.mkv", "mkv", cut, "clip.mkv"),
  Case("reconstruct", f"{_RECONSTRUCT}clip.webm", "webm", noise, "clip.webm"),
  Case("reconstruct", f"{_RECONSTRUCT}clip.gif", "gif", cut, "clip.gif"),
  Case("reconstruct", f"{_RECONSTRUCT}still.png", "png", noise, "still.png"),
  Case(
    "train",
    f"{_TRAIN} --config.data.source=records --config.data.path={{input}}/clips",
    "clips",
    cut,
    "clips",
  ),
  Case(
    "precompute",
    "--videos={input} --captions={input}/table.jsonl --model=tiny"
    " --base= --bucket=64x64 --output={output}",
    "captions .jsonl",
    cut,
    "table.jsonl",
  ),
  Case(
    "precompute",
    "--videos={input} --captions={input}/table.csv --model=tiny"
    " --base= --bucket=64x64 --output={output}",
    "captions .csv",
    lambda path: path.write_text(path.read_text() + '"' + 200_000 * "x"),
    "table.csv",
  ),
  Case("export", _EXPORT, "run's config", nested, "config.json"),
  Case(
    "export", _EXPORT, "run's config", field("task", value=[]), "config.json"
  ),
  Case(
    "evaluate",
    "--model={model} --clips={input}/clips --output={output}.json",
    "clips",
    cut,
    "clips",
  ),
)


@pytest.mark.parametrize(
  "case", CASES, ids=lambda case: f"{case.program}-{case.given}".split("'")[0]
)
def test_damaged(programs, model, tmp_path, case):
  given = next(x for x in inputs.INPUTS if x.name == case.given)
  directory = tmp_path / "input"
  directory.mkdir()
  given.make(directory)
  path = min(directory.glob(given.target))
  case.damage(path)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  finished = programs.run(
    f"launch.{case.program}",
    *(
      flag.format(
        input=directory, model=model[0], output=tmp_path / "new" / "output"
      )
      for flag in case.flags.split()
    ),
  )
  after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  require_one_sentence(finished, case.word)
  assert before == after
