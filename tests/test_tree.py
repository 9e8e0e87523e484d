"""Names of leaves, ordered rules; two-sided differences."""

import typing

import jax
import numpy as np
import pytest

from dcvideogen_jax import differences, errors, tree


class Pair(typing.NamedTuple):
  mu: object
  nu: object


TREE = {
  "params": {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}},
  "opt": (Pair(np.zeros(4), None), [np.zeros(())]),
}


def test_names_join_attributes_keys_and_indices():
  assert tree.names(TREE) == [
    "opt/0/mu",
    "opt/1/0",
    "params/a/bias",
    "params/a/kernel",
  ]
  assert tree.shapes(TREE)["params/a/kernel"] == (2, 3)
  assert tree.flatten(TREE)["params/a/bias"] is TREE["params"]["a"]["bias"]


def test_the_first_rule_that_matches_a_whole_name_wins():
  rules = [("params/.*/bias", 1), ("params/.*", 2), ("opt.*", 3)]
  assert list(tree.match(rules, tree.names(TREE)).values()) == [3, 3, 1, 2]
  assert tree.match_tree(rules, TREE)["params"] == {
    "a": {"kernel": 2, "bias": 1}
  }


def test_a_rule_must_match_the_whole_name():
  with pytest.raises(errors.UserError, match="a/kernel"):
    tree.match([("a", 1), ("kernel", 2)], ["a/kernel"])


def test_all_uncovered_names_are_listed_at_once():
  with pytest.raises(errors.UserError) as e:
    tree.match([("opt/.*", 0)], tree.names(TREE))
  assert "params/a/bias, params/a/kernel;" in str(e.value)
  assert "'opt/.*'" in str(e.value)


def test_a_broken_regular_expression_is_named():
  with pytest.raises(errors.UserError, match=r"'\(a'"):
    tree.match([("(a", 0)], ["a"])


def test_split_and_merge_are_inverse():
  variables = {
    "params": {"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}},
    "lora": {"a": {"a": 4}},
    "teacher": {"kernel": 5},
  }
  mask = tree.match_tree([("(lora|.*bias).*", True), (".*", False)], variables)
  kept, rest = tree.split(variables, mask)
  assert kept == {"params": {"a": {"bias": 2}}, "lora": {"a": {"a": 4}}}
  assert rest == {
    "params": {"a": {"kernel": 1}, "b": {"kernel": 3}},
    "teacher": {"kernel": 5},
  }
  assert tree.merge(kept, rest) == variables == tree.merge(rest, kept)
  everything = jax.tree.map(lambda _: True, variables)
  assert tree.split(variables, everything) == (variables, {})


@pytest.mark.parametrize("other", [{"a": {"b": 2}}, {"a": 1}])
def test_trees_that_share_a_leaf_do_not_merge(other):
  with pytest.raises(ValueError, match="leaf"):
    tree.merge({"a": {"b": 1}}, other)


def test_diff_reports_both_sides_and_shapes():
  expected = {"a": (1,), "b": (2, 2), "c": (3,)}
  found = {"b": (2, 4), "c": (3,), "d": ()}
  assert differences.tell(expected, found) == (
    "missing a (1,); unexpected d (); shape of b: expected (2, 2), found (2, 4)"
  )
  assert differences.tell(expected, expected) == ""


def test_require_equal_raises_every_difference():
  differences.require_equal({"a": (1,)}, {"a": (1,)}, "x.pt")
  with pytest.raises(errors.UserError) as e:
    differences.require_equal({"a": (1,), "b": ()}, {"c": ()}, "x.pt")
  assert "x.pt" in str(e.value) and "3 differences" in str(e.value)
