"""Cost against pixels and frames: tokens, FLOPs and exponents."""

import pytest

from benchmarks import cost

SMALL = {"layers": 1, "width": 32, "heads": 2, "ffn_width": 48}
SMALL |= {"text_width": 16, "frequencies": 16}


def test_tokens_are_those_of_the_spaces():
  assert cost.latents("DC-AE-V", (80, 480, 832)) == (20, 15, 26)
  assert cost.latents("Wan", (80, 480, 832)) == (21, 60, 104)
  (deep,), (wan,) = (
    [row for row in rows if row["space"] == space]
    for space in cost.SPACES
    for rows in [cost.measure([(80, 480, 832)], 1, False, SMALL)]
  )
  assert deep["tokens"] == 7800 and wan["tokens"] == 32760
  assert wan["PFLOP"] > 4 * deep["PFLOP"] > 0
  with pytest.raises(ValueError, match="smaller than a latent"):
    cost.latents("DC-AE-V", (80, 16, 832))


def test_exponents_are_those_of_the_data(tmp_path):
  sizes = [(4, 2, 8), (4, 4, 4), (4, 8, 8), (8, 4, 4), (16, 4, 4)]
  rows = [
    {"space": space, "frames": t, "height": h, "width": w}
    | {"s": factor * t**1.5 * (h * w) ** power}
    for space, factor, power in (("DC-AE-V", 3, 1.25), ("Wan", 1, 2))
    for t, h, w in sizes
  ]
  first, second = cost.exponents(rows, "s")
  assert first["against pixels"] == pytest.approx(1.25)
  assert second["against pixels"] == pytest.approx(2)
  assert first["against frames"] == pytest.approx(1.5)
  cost.plot(rows, "s", tmp_path / "cost.png")
  assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_pass_is_timed():
  rows = cost.measure([(8, 64, 64)], 1, True, SMALL)
  assert [row["space"] for row in rows] == ["DC-AE-V", "Wan"]
  assert min(row["s"] for row in rows) > 0
