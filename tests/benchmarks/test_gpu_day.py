"""The driver of `make gpu`, and what its cases have to be alike."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tables
from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import cases, kernels, parts, programs
from configs import adapt
from dcvideogen_jax import flops
from dcvideogen_jax.train import step as step_lib

# Packages that a machine with a GPU need not have.
_OTHERS = (
  *("av", "grain", "ml_collections", "torch", "orbax", "etils", "tqdm"),
  *("safetensors", "huggingface_hub", "tokenizers", "matplotlib", "PIL"),
)


def test_parts_need_few_packages():
  """Whatever else a module imports would be missing there."""
  modules = ("__main__", "parts", "kernels", "programs", "decoding")
  lines = [f"import sys; sys.modules.update(dict.fromkeys({_OTHERS}))"]
  lines += [f"import benchmarks.gpu.{name}" for name in modules]
  subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_a_part_that_fails_keeps_no_other_from_running(tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text("")
  environment = driver.surroundings(tmp_path)
  environment["JAX_PLATFORMS"] = "cpu"
  driver.run("machine", ["--toy"], rows, 0.1, environment)
  driver.run("machine", ["--target=nonsense"], rows, 60, environment)
  driver.run("machine", ["--toy"], rows, 0, environment)
  failed = [row["failed"] for row in driver.read(rows)]
  assert failed[0] == "ended after 0 s"
  assert failed[1].startswith("exit code 1: ") and "nonsense" in failed[1]
  assert failed[2] == "no time was left"
  text = driver.summary("machine", rows, 3)
  assert text.startswith("machine: 3 rows, 3 failed, 3 s\n  the rest: ended")
  driver.write(rows, tmp_path / "results.md")
  assert parts.PARTS["machine"].title in (tmp_path / "results.md").read_text()


def test_a_row_that_fails_keeps_no_other_from_running(monkeypatch):
  def rows(setting):
    yield lambda: {"case": "first"}
    yield lambda: 1 / 0
    yield lambda: {"case": "last"}

  monkeypatch.setitem(parts.PARTS, "own", parts.Part("", 1, rows))
  setting = parts.Setting(True, jax.devices()[0], True, 2**30)
  first, second, last = parts.run("own", setting, 60)
  assert [first["case"], last["case"]] == ["first", "last"]
  assert second["failed"] == "ZeroDivisionError: division by zero"
  (none,) = parts.run("own", setting, -1)
  assert none["failed"] == "no time was left"


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text('{"part": "step"}\n{"part": "st')
  assert driver.read(rows) == [{"part": "step"}]


def test_what_a_gpu_would_run_is_said():
  said = driver.absent(["kernels", "step"])
  assert "kernels" in said and "80" in said and "toy size" in said
  assert "decode" not in said


def test_a_case_is_timed_and_its_work_counted():
  x = cases.shape(16, 32, dtype="float32")
  y = cases.shape(32, 8, dtype="float32")
  case = cases.Case("product", jnp.matmul, (x, y), "float32")
  row = cases.measure(case, jax.devices()[0], True)
  work = 2 * 16 * 32 * 8
  assert row["TFLOP/s"] == pytest.approx(work / row["ms"] / 1e9)
  assert row["planned GiB"] == pytest.approx(
    4 * (16 * 32 + 32 * 8 + 16 * 8) / 2**30
  )
  assert row["finite"] and row["compile s"] > 0
  assert "of peak" not in row  # That of a CPU is not known.
  assert "ms" not in cases.measure(case, jax.devices()[0], False)


def test_what_is_not_finite_is_said():
  case = cases.Case("log", lambda x: jnp.log(-jnp.abs(x)), (cases.shape(8),))
  assert not cases.measure(case, jax.devices()[0], True)["finite"]


def test_errors_above_the_bound_are_failures(monkeypatch):
  kernel = kernels.Kernel("chunked", "float32", 16, 32, 24)
  found = kernels.errors(kernel)
  assert 0 < max(found.values()) < 1e-4
  row = kernels._row("name", "float32", found)
  assert "failed" not in row
  wrong = {**found, "dk": 1.0, "dv": float("nan")}
  row = kernels._row("name", "float32", wrong)
  assert row["failed"] == "dk, dv above the bound"


def test_a_training_step_is_that_of_the_trainer():
  """As many FLOPs, and the same leaves, for the same small model."""
  config = adapt.get_config("wan_t2v_1_3b,phase=lora").to_dict()
  assert {**programs.OPTIM} == {
    key: config["optim"][key] for key in programs.OPTIM
  }
  assert programs.LEVELS == config["levels"]
  assert programs.LORA == {
    "lora_rank": config["lora"]["rank"],
    "lora_alpha": config["lora"]["alpha"],
  }
  config["start"]["random"] = True
  config["lora"] = {"rank": 4, "alpha": 512.0}
  config["model"] |= programs.SMALL
  config |= {"mesh": {"data": 1}, "ema": {**config["ema"], "decay": 0.0}}
  shapes = {
    "deep": cases.shape(1, 2, 3, 5, 32, dtype="float32"),
    "text": cases.shape(1, 8, 16, dtype="float32"),
  }
  run = step_lib.plan(config, jax.devices()[:1])
  traced = step_lib.trace(run, config, shapes)
  module, variables = programs._transformer(
    True, lora_rank=4, lora_alpha=512.0, remat="full"
  )
  step, state = programs.training_step(module, variables)
  ours = jax.jit(step).trace(state, *shapes.values())
  assert flops.count(ours.jaxpr.jaxpr) == flops.count(traced.jaxpr.jaxpr)

  def leaves(tree):
    return sorted(
      (x.shape, str(x.dtype)) for x in jax.tree.leaves(tree) if x.ndim
    )

  assert leaves(state["trained"]) == leaves(run.state.params)
  assert leaves(state["opt"]) == leaves(run.state.opt)


def test_rows_become_one_table():
  rows = [
    {"case": "a|b", "ms": 1234.5, "ok": True},
    {"case": "c", "s": 0.01234},
  ]
  assert tables.markdown(rows).splitlines() == [
    "| case | ms | ok | s |",
    "| --- | --- | --- | --- |",
    "| a\\|b | 1234 | yes |  |",
    "| c |  |  | 0.0123 |",
  ]
  assert json.dumps(rows)
