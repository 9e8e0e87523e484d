"""Descriptions of low-rank updates, beside the file or in its header."""

import json
import re
import warnings

import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, errors
from tests.convert import lora_files

PLAIN = {"peft_type": "LORA", "lora_alpha": 6}
RANKS = {"blocks.0.self_attn.q": (2, 2.0), "blocks.1.ffn.2": (4, 4.0)}
# Nested deeper than Python's JSON parser can read.
DEEP = "[" * 200_000


def written(path, config, spelling="peft", found=None, header=False):
  """Writes a file of updates, with a description beside it or in its header."""
  found = lora_files.factors(RANKS) if found is None else found
  text = config if isinstance(config, str) else json.dumps(config)
  metadata = {"lora_adapter_metadata": text} if header else {}
  if not header:
    (path.parent / "adapter_config.json").write_text(text)
  safetensors.numpy.save_file(lora_files.spelt(spelling, found), path, metadata)
  return path


def merged(base, source):
  lora = convert.load_lora("wan_dit", source, base[0])
  return convert.merge(base[1]["params"], lora)


def refused(base, source):
  with pytest.raises(errors.UserError) as e:
    convert.load_lora("wan_dit", source, base[0])
  message = str(e.value)
  assert "\n" not in message and len(message) < 500
  return message


# --- patterns ----------------------------------------------------------------

PATTERNS = {
  "start": ({"^blocks.1.ffn.2": 32}, {"blocks.1.ffn.2": 32}),
  "alternatives": (
    {r"^blocks.0.self_attn.k|^blocks\.1\.ffn\.2|nothing": 32},
    {"blocks.1.ffn.2": 32},
  ),
  "not_the_start": ({"^ffn.2": 32, "^1.ffn.2": 32}, {}),
  "first_wins": (
    {"^blocks.1.ffn.2": 5, "ffn.2": 32, "^blocks.*": 9},
    {"blocks.1.ffn.2": 5, "blocks.0.self_attn.q": 9},
  ),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
  ("spelling", "prefix"),
  [
    ("peft", ""),
    ("peft", "base_model.model."),
    ("diffsynth_pipe", ""),
    ("diffsynth", "transformer."),
    ("kohya", ""),
  ],
)
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.filterwarnings("ignore:.*more than one alpha_pattern")
def test_patterns_look_at_the_name_in_the_model(
  base, tmp_path, name, spelling, prefix, header
):
  patterns, alphas = PATTERNS[name]
  config = {f"{prefix}{n}": x for n, x in PLAIN.items()}
  config[f"{prefix}alpha_pattern"] = patterns
  path = tmp_path / "adapter_model.safetensors"
  found = lora_files.factors(RANKS)
  written(path, config, spelling, found, header)
  expected = {m: (len(a), alphas.get(m, 6)) for m, (a, _) in found.items()}
  lora_files.assert_merged(
    merged(base, path), base, lora_files.merged_by_hand(found, expected)
  )


def test_patterns_that_contradict_each_other_are_told(base, tmp_path):
  path = tmp_path / "adapter_model.safetensors"
  config = PLAIN | {"alpha_pattern": {"ffn.2": 5, "blocks.1.ffn.2": 5, "2": 4}}
  written(path, config)
  with pytest.warns(UserWarning, match="adapter_config.json: more than one"):
    convert.load_lora("wan_dit", path, base[0])


def test_a_description_of_other_weights(base, tmp_path):
  path = tmp_path / "adapter_model.safetensors"
  written(path, PLAIN | {"r": 2, "rank_pattern": {"^blocks.1.ffn.2": 4}})
  convert.load_lora("wan_dit", path, base[0])
  written(path, PLAIN | {"r": 2, "rank_pattern": {"^blocks.0.ffn.2": 4}})
  assert "gives blocks.1.ffn.2 the rank 2, the weights have 4" in refused(
    base, path
  )


# --- where it is -------------------------------------------------------------


def factor_of(base, source):
  """Returns the factor by which one update was multiplied."""
  lora = convert.load_lora("wan_dit", source, base[0])
  a, b = lora_files.factors(RANKS)["blocks.1.ffn.2"]
  found = lora.factors["blocks/ffn/linear_2/kernel"]
  return np.linalg.norm(found[0][1] @ found[1][1]) / np.linalg.norm(b @ a)


def test_no_alpha_is_told(base, tmp_path):
  path = tmp_path / "style.safetensors"
  found = lora_files.factors(RANKS)
  safetensors.numpy.save_file(lora_files.spelt("comfy", found), path)
  with pytest.warns(UserWarning) as told:
    np.testing.assert_allclose(factor_of(base, path), 1, rtol=1e-5)
  (line,) = told
  assert str(line.message) == (
    f"{path}: no alpha is known, so it is taken to be the rank"
  )
  spelt = lora_files.spelt("comfy", found, RANKS)
  tensors = {name: np.asarray(x) for name, x in spelt.items()}
  safetensors.numpy.save_file(tensors, path)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    convert.load_lora("wan_dit", path, base[0])


def test_a_file_that_was_renamed(base, tmp_path):
  """A description belongs to a renamed file unless it has a file of its own."""
  path = written(tmp_path / "style.safetensors", PLAIN)
  with pytest.warns(UserWarning, match="style.safetensors: alpha is taken fr"):
    np.testing.assert_allclose(factor_of(base, path), 6 / 4, rtol=1e-5)
  (tmp_path / "adapter_model.safetensors").write_bytes(path.read_bytes())
  with pytest.warns(UserWarning, match="no alpha is known"):
    np.testing.assert_allclose(factor_of(base, path), 1, rtol=1e-5)


def test_headers_of_several_files(base, tmp_path):
  for i, module in enumerate(RANKS):
    found = {module: lora_files.factors(RANKS)[module]}
    written(tmp_path / f"{i}.safetensors", PLAIN, "peft", found, header=True)
  assert "several files of low-rank updates, name one: 0.s" in refused(
    base, tmp_path
  )


def test_without_lora_alpha_it_is_the_one_of_peft(base, tmp_path):
  path = written(tmp_path / "adapter_model.safetensors", {"peft_type": "LORA"})
  with pytest.warns(UserWarning, match="no lora_alpha: PEFT's default of 8"):
    np.testing.assert_allclose(factor_of(base, path), 2, rtol=1e-5)


# --- what it may not say -----------------------------------------------------


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize(
  ("config", "message"),
  [
    (DEEP, "is not JSON: "),
    ("[" * 50 + "]" * 50, "expected the description of low-rank updates to be"),
    ("7", "to be a JSON object, found 7"),
    ("", "is not JSON"),
    ('{"peft_type": "LORA", "lora_al', "is not JSON"),
    ('{"lora_alpha": NaN}', "lora_alpha to be a finite number, found nan"),
    ('{"lora_alpha": 1e999}', "to be a finite number, found inf"),
    ('{"lora_alpha": 1e39}', "to be a finite number, found 1e+39"),
    ('{"lora_alpha": null}', "to be a finite number, found None"),
    ('{"lora_alpha": "16"}', "to be a finite number, found '16'"),
    ('{"lora_alpha": true}', "to be a finite number, found True"),
    ('{"lora_alpha": [16]}', "to be a finite number, found [16]"),
    (PLAIN | {"r": 0}, "expected r, a rank, to be a positive integer, found 0"),
    (PLAIN | {"r": -4}, "to be a positive integer, found -4"),
    (PLAIN | {"r": 4.5}, "to be a positive integer, found 4.5"),
    (PLAIN | {"alpha_pattern": [1]}, "alpha_pattern to be a JSON object, foun"),
    (PLAIN | {"alpha_pattern": "q"}, "to be a JSON object, found 'q'"),
    (PLAIN | {"alpha_pattern": {"(": 1}}, "'(' in alpha_pattern is no regular"),
    (PLAIN | {"rank_pattern": {"q**": 1}}, "'q**' in rank_pattern is no regul"),
    (PLAIN | {"alpha_pattern": {"(" * 9000: 1}}, "is no regular expression: "),
    (
      PLAIN | {"alpha_pattern": {"q": float("nan")}},
      "alpha_pattern of 'q' to be a finite number, found nan",
    ),
    (
      PLAIN | {"rank_pattern": {"q": "two"}},
      "rank_pattern of 'q', a rank, to be a positive integer, found 'two'",
    ),
    (PLAIN | {"lora_alpha": "\ud800" * 300}, "found '\\ud800"),
    (PLAIN | {"peft_type": "OFT"}, "expected LoRA, DoRA, LoHa, LoKr or (IA)3"),
    (PLAIN | {"peft_type": ["IA3"]}, "found peft_type=['IA3']"),
    (
      PLAIN | {"use_qalora": True, "target_parameters": ["scale_shift_table"]},
      "found use_qalora=True, target_parameters=['scale_shift_table']",
    ),
    ({"peft_type": "LOKR", "alpha": "x"}, "alpha to be a finite number, found"),
  ],
)
def test_damaged_descriptions(base, tmp_path, config, message, header):
  path = tmp_path / "adapter_model.safetensors"
  written(path, config, header=header)
  found = refused(base, path)
  assert message in found
  where = path.name if header else "adapter_config.json"
  assert found.startswith(f"{tmp_path / where}: ")


@pytest.mark.parametrize(
  "start",
  ["pissa_niter_16", "corda", "loftq", "lora_ga", "something new", 3],
)
def test_updates_of_an_altered_base_are_refused(base, tmp_path, start):
  path = tmp_path / "adapter_model.safetensors"
  written(path, PLAIN | {"init_lora_weights": start})
  assert re.search(
    "with init_lora_weights=.* PEFT has (altered|taken a random decomposition,"
    " which cannot be repeated, off) the base that the updates belong to",
    refused(base, path),
  )


@pytest.mark.parametrize(
  "start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"]
)
def test_updates_of_the_base_itself(base, tmp_path, start):
  path = tmp_path / "adapter_model.safetensors"
  written(path, PLAIN | {"init_lora_weights": start})
  np.testing.assert_allclose(factor_of(base, path), 6 / 4, rtol=1e-5)
