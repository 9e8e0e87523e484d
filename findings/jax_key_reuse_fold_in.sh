#!/usr/bin/env bash
# jax 0.10.2: debug_key_reuse misses equal keys from split and fold_in.
#
# jax.random.split(key)[i] and jax.random.fold_in(key, i) are the same key with
# the default generator. jax.debug_key_reuse stops a program that draws twice
# from one key, or draws from a key and splits it. It lets a key be folded as
# often as one likes, as the numbers folded in are trusted to differ, and does
# so also if the key has been split. So a program that splits a key in one
# place and folds a number into it in another draws the same noise twice under
# the check, with and without jit.
#
# It matters in training of diffusion models because keys are folded with the
# step and split for noise, timesteps and dropout: two of them can be equal
# although the check is on. This project's tests watch by the values of the
# keys that none is used in two ways (tests/keys.py).
#
# Exits with 0 if jax does so, with 1 if that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax
import numpy as np


def draw_twice(key):
  return jax.random.normal(key, (4,)), jax.random.normal(key, (4,))


def draw_and_split(key):
  return jax.random.normal(key, (4,)), jax.random.split(key)


def split_and_fold(key):
  noise = jax.random.normal(jax.random.split(key)[1], (4,))
  return noise, jax.random.normal(jax.random.fold_in(key, 1), (4,))


def stopped(function):
  try:
    with jax.debug_key_reuse(True):
      function(jax.random.key(0))
  except jax.errors.KeyReuseError:
    return True
  return False


print(f"jax {jax.__version__}")
first, second = split_and_fold(jax.random.key(0))
equal = bool(np.array_equal(first, second))
print("split(key)[1]:  ", np.round(first, 4))
print("fold_in(key, 1):", np.round(second, 4))
print("expected: the check stops a program that draws the same numbers twice")
as_described = equal
for function in (draw_twice, draw_and_split, split_and_fold):
  found = stopped(function), stopped(jax.jit(function))
  print(f"seen: {function.__name__} stopped: {found[0]}, in jit: {found[1]}")
  as_described &= found == ((function is not split_and_fold,) * 2)
if not as_described:
  print("changed: this version does not do what is described above")
  sys.exit(1)
print("as described: the same noise is drawn twice and the check is silent")
PYTHON
