"""Model cards: what they say, and a licence that nobody guesses."""

import pytest

from dcvideogen_jax.convert import cards

MODEL = {
  "kind": "wan_dit",
  "variant": "dc-wan2.1-t2v-14b",
  "parameters": 1234567,
  "tensors": 89,
  "dtypes": ["bfloat16", "float32"],
  "files": {"a.safetensors": 2_000_000_000, "b.safetensors": 500_000_000},
  "source": "weights/transformer",
  "command": "dcvideogen convert --kind=wan_dit",
  "version": "0.1.0",
}


def head(text):
  start, fields, _ = text.split("---\n", 2)
  assert not start
  return dict(line.split(": ", 1) for line in fields.splitlines())


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# A\n", "apache-2.0"),
    ("---\nlicense: 'mit'  # ours\n---\n", "mit"),
    ("---\ntags:\n- license: x\nlicense:\n- a\n- b\n---\n", None),
    ("# Title\n\nlicense: mit\n", None),
    ("---\nlicense: mit\n", None),
    ("Apache License, Version 2.0", None),
    (None, None),
  ],
)
@pytest.mark.parametrize("above", [False, True])
def test_the_licence_is_that_of_the_sources_card(
  tmp_path, text, expected, above
):
  source = tmp_path / "transformer"
  source.mkdir()
  if text is not None:
    (source.parent if above else source).joinpath("README.md").write_text(text)
  found = cards.licence(source)
  assert (found and found.fields["license"]) == expected
  card = cards.card(**MODEL, terms=found)
  assert head(card).get("license") == expected
  assert ("Not known" in card) == (expected is None)
  given = cards.licence(source, "cc-by-4.0")
  assert head(cards.card(**MODEL, terms=given))["license"] == "cc-by-4.0"


def test_a_licence_with_a_name_of_its_own(tmp_path):
  (tmp_path / "README.md").write_text(
    "---\nlicense: other\nlicense_name: nsclv1\nlicense_link: LICENSE\n---\n"
  )
  (tmp_path / "model.safetensors").touch()
  found = cards.licence(tmp_path / "model.safetensors")
  assert found.fields == {
    "license": "other",
    "license_name": "nsclv1",
    "license_link": "LICENSE",
  }


def test_what_a_card_says():
  card = cards.card(**MODEL, adapters=["style.safetensors,0.8"])
  for line in (
    "# wan_dit, dc-wan2.1-t2v-14b",
    "| parameters | 1,234,567 in 89 tensors |",
    "| dtypes | bfloat16, float32 |",
    "| size | 2.500 GB in 2 files |",
    "| `a.safetensors` | 2,000,000,000 bytes |",
    "- source: `weights/transformer`",
    "- merged adapter: `style.safetensors,0.8`",
    "dcvideogen convert --kind=wan_dit",
  ):
    assert line in card.splitlines()
  assert "Merged adapters have licences of their own" in card
  assert "repository" not in card


def test_a_commit_of_a_repository_is_named():
  source = "/x/hub/models--dc-ai--DC-Gen/snapshots/0a1b/transformer"
  assert cards.repository(source) == "dc-ai/DC-Gen, commit 0a1b"
  card = cards.card(**MODEL | {"source": source})
  assert "- repository: dc-ai/DC-Gen, commit 0a1b" in card
