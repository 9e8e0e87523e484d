"""Cleaning equals that of diffusers 0.42, tokens those of transformers 5.23."""

import json

import numpy as np
import pytest
import tokenizers

from dcvideogen_jax import errors
from dcvideogen_jax.data import tokenize

PROMPTS = [
  "a cat",
  "  A   cat\n\tsat. ",
  "",
  "the cat, a mat &amp;amp; 猫",
  "a cat sat " * 20,
  *tokenize.NEGATIVE_PROMPTS.values(),
]


def small(end=True):
  """A tokenizer of UMT5's construction with a few words."""
  pieces = ["<pad>", "</s>", "<s>", "<unk>", "▁", "▁a", "▁cat", "▁the", "at"]
  pieces += [*"abcehmst.,&猫倒走着"]
  scores = [0.0] * 4 + [-2.0, -1.0, -1.5, -1.5, -3.0] + [-5.0] * 15
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.Unigram(
      list(zip(pieces, scores, strict=True)), unk_id=3, byte_fallback=False
    )
  )
  tokenizer.normalizer = tokenizers.normalizers.Replace(
    tokenizers.Regex(" {2,}"), " "
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  if end:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single="$A </s>", special_tokens=[("</s>", 1)]
    )
  tokenizer.add_special_tokens(pieces[:4])
  return tokenizer


@pytest.fixture
def directory(tmp_path):
  """Files as a published checkpoint has them."""
  small().save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
      }
    )
  )
  return tmp_path


@pytest.mark.parametrize(
  ("prompt", "expected"),
  [
    ("  two \n\t words\u3000", "two words"),
    ("<i> &amp;quot;x&amp;quot; &amp;amp;quot;", '<i> "x" &quot;'),
    ("schÃ¶n", "schön"),
    ("ａ，ｂ", "a,b"),
    ("\u00a0", ""),
  ],
)
def test_prompts_are_cleaned(prompt, expected):
  assert tokenize.clean(prompt) == expected


def test_negative_prompts_differ_in_what_cleaning_leaves():
  """Full-width commas are repaired, so two of the three forms are one."""
  prompts = tokenize.NEGATIVE_PROMPTS
  assert prompts["wan"].count("，") == 27 == prompts["ascii"].count(",")
  assert prompts["wan"] != prompts["ascii"]
  cleaned = {name: tokenize.clean(text) for name, text in prompts.items()}
  assert cleaned["wan"] == cleaned["ascii"] == prompts["ascii"]
  assert cleaned["wan_i2v"] == cleaned["ascii_i2v"] == prompts["ascii_i2v"]
  assert cleaned["wan_i2v"].endswith(cleaned["wan"])
  assert len(set(cleaned.values())) == 3


def test_texts_are_padded(directory):
  tokenizer = tokenize.Tokenizer.from_directory(directory)
  ids, mask = tokenizer(["a cat", "", "the zat"], 5)
  assert ids.dtype == mask.dtype == np.int32
  np.testing.assert_array_equal(
    ids, [[5, 6, 1, 0, 0], [1, 0, 0, 0, 0], [7, 4, 3, 8, 1]]
  )
  np.testing.assert_array_equal(mask.sum(1), [3, 1, 5])
  np.testing.assert_array_equal(mask, np.sort(mask, axis=1)[:, ::-1])
  assert tokenizer(["a"])[0].shape == (1, 512)
  assert tokenizer.vocab == 24


def test_long_texts_keep_their_end_unless_sliced(directory):
  tokenizer = tokenize.Tokenizer.from_directory(directory)
  ids, mask = tokenizer(["a cat a cat"], 3)
  np.testing.assert_array_equal(ids, [[5, 6, 1]])
  assert mask.all()
  ids, _ = tokenizer(["a cat a cat"], 3, keep_end=False)
  np.testing.assert_array_equal(ids, [[5, 6, 5]])
  with pytest.raises(errors.UserError, match="found 0"):
    tokenizer(["a"], 0)


def test_tokens_are_counted_however_many(directory):
  tokenizer = tokenize.Tokenizer.from_directory(directory)
  texts = ["a cat", "", "a cat a cat"]
  _, mask = tokenizer(texts, 512)
  assert tokenizer.count(texts).tolist() == mask.sum(axis=1).tolist()
  assert tokenizer.count([]).shape == (0,)


def test_half_a_surrogate_pair_is_refused(directory):
  """Cleaning would silently replace it by U+FFFD."""
  tokenizer = tokenize.Tokenizer.from_directory(directory)
  with pytest.raises(errors.UserError, match="half of a surrogate pair"):
    tokenizer(["a \ud800"])


def test_settings_in_the_file_do_not_count(tmp_path):
  tokenizer = small()
  tokenizer.enable_truncation(2)
  tokenizer.enable_padding(length=9)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  ids, _ = tokenize.Tokenizer.from_directory(tmp_path)(["a cat a"], 5)
  np.testing.assert_array_equal(ids, [[5, 6, 5, 1, 0]])


def test_unusable_directories_are_told(tmp_path):
  read = tokenize.Tokenizer.from_directory
  with pytest.raises(errors.UserError, match="there is no tokenizer"):
    read(tmp_path)
  (tmp_path / "spiece.model").write_bytes(b"")
  with pytest.raises(errors.UserError, match="but no tokenizer.json"):
    read(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(errors.UserError, match="is not a tokenizer"):
    read(tmp_path)
  small(end=False).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(errors.UserError, match="does not end a text"):
    read(tmp_path)
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
  words.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(errors.UserError, match="no token <pad>, </s>"):
    read(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "AutoTokenizer"])
def test_equals_the_installed_transformers(directory, kind):
  """Called as diffusers' WanPipeline calls it, on the same cleaned text."""
  import transformers

  reference = getattr(transformers, kind).from_pretrained(directory)
  expected = reference(
    [tokenize.clean(prompt) for prompt in PROMPTS],
    padding="max_length",
    max_length=30,
    truncation=True,
    add_special_tokens=True,
    return_attention_mask=True,
    return_tensors="np",
  )
  ids, mask = tokenize.Tokenizer.from_directory(directory)(PROMPTS, 30)
  assert 0 < mask.mean() < 1
  if kind == "AutoTokenizer":
    # Its T5Tokenizer takes T5's <unk>, 2, whatever the file says.
    ids = np.where(ids == 3, 2, ids)
  np.testing.assert_array_equal(ids, expected["input_ids"])
  np.testing.assert_array_equal(mask, expected["attention_mask"])


@pytest.mark.parity
def test_cleaning_equals_the_installed_diffusers():
  from diffusers.pipelines.wan import pipeline_wan

  for prompt in [*PROMPTS, "schÃ¶n &amp;lt;b&amp;gt;", "“quoted”\u200b  x"]:
    assert tokenize.clean(prompt) == pipeline_wan.prompt_clean(prompt)
