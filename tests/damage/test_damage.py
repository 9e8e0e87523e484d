"""Whatever is damaged is noticed, told in a sentence, and takes no time."""

import collections

import numpy as np
import pytest

from tests.damage import damage, faulty, inputs, torch_files, trial

# Of every input twice, and about ten times.
_FEW, _MANY = 2 * len(inputs.INPUTS), 500


def _require_right(directory, numbers):
  with trial.Trials(directory) as trials:
    tried = [*trials.run(numbers)]
  print(trial.table(tried))
  assert not [trial.told(found) for found in tried if found["wrong"]]
  # The damage is neither too small to be seen nor so large that all is lost.
  outcomes = collections.Counter(found["outcome"] for found in tried)
  assert outcomes["sentence"] > len(tried) / 2
  assert outcomes["equal"] + outcomes["values"] > len(tried) / 10


def test_a_sample(tmp_path):
  _require_right(tmp_path, range(_FEW))


@pytest.mark.nightly
def test_the_rest(tmp_path):
  _require_right(tmp_path, range(_FEW, _MANY))


def test_faults_are_found(tmp_path):
  module = faulty.__name__
  with trial.Trials(tmp_path, module, longest=1, patience=4) as trials:
    tried = [*trials.run(range(len(faulty.INPUTS)))]
  for found, expected in zip(tried, faulty.FAULTS, strict=True):
    assert expected.startswith(found["wrong"].partition("/")[0]), found
    assert bool(expected) == bool(found["wrong"]), found


@pytest.mark.parametrize(
  ("name", "form"),
  [
    ("png", "bytes"),
    ("PEFT's config", "json"),
    ("captions .jsonl", "lines"),
    ("captions .csv", "table"),
    ("prompts .txt", "text"),
    ("PEFT", "safetensors"),
    ("trainer's updates", "torch"),
  ],
)
def test_damage_is_of_its_seed(name, form, tmp_path):
  """The same every time, another for another seed, and always some."""
  given = next(x for x in inputs.INPUTS if x.name == name)
  assert given.form == form
  given.make(tmp_path)
  path = min(tmp_path.glob(given.target))
  content = path.read_bytes()
  seen = []
  for seed in (*range(10), *range(10)):
    path.write_bytes(content)
    done = damage.damage(path, form, np.random.default_rng(seed))
    seen.append((done, path.read_bytes()))
  assert seen[:10] == seen[10:]
  assert len({changed for _, changed in seen}) > 5
  assert content not in [changed for _, changed in seen]


@pytest.mark.parity
def test_torch_reads_files_like_its_own(tmp_path):
  import torch

  arrays = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([7], np.int64),
  }
  torch_files.write(tmp_path / "x.pt", {"state": arrays, "step": 3})
  found = torch.load(tmp_path / "x.pt", weights_only=True)
  assert found["step"] == 3
  for name, array in arrays.items():
    np.testing.assert_array_equal(found["state"][name].numpy(), array)
