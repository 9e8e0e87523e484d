"""launch.export on a run that is there, as its users run it."""

import json

import pytest

from configs import tiny
from dcvideogen_jax import convert
from tests.adapt import runs
from tests.train import finished


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "run"
  finished.write(workdir, runs.config("scratch"))
  return workdir


def test_a_transformer(programs, run, tmp_path):
  done = programs.run(
    "launch.export",
    f"--workdir={run}",
    f"--output={tmp_path / 'out'}",
    "--layout=original",
  )
  assert done.code == 0, done.stderr
  assert done.stdout == f"step {finished.STEP}: {tmp_path / 'out'}\n"
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["_class_name"] == "WanModel"
  convert.load("wan_dit", tmp_path / "out")


def test_a_full_disk(programs, run, tmp_path):
  done = programs.run(
    "launch.export",
    f"--workdir={run}",
    f"--output={tmp_path / 'out'}",
    largest_file=3000,
  )
  assert done.code == 2 and "Traceback" not in done.stderr, done.stderr
  (line,) = [x for x in done.stderr.splitlines() if "error: " in x]
  assert line.startswith("error: cannot write ") and "File too large" in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [None, 0.75])
def test_an_autoencoder_s_scale_is_measured_unless_given(
  programs, tmp_path, given
):
  workdir = tmp_path / "run"
  config = tiny.get_config("autoencoder,runlocal").to_dict()
  finished.write(workdir, config)
  flags = [] if given is None else [f'--fields={{"latent_scale": {given}}}']
  done = programs.run(
    "launch.export",
    f"--workdir={workdir}",
    f"--output={tmp_path / 'out'}",
    *flags,
  )
  assert done.code == 0, done.stderr
  module, _ = convert.load("dc_ae_v", tmp_path / "out")
  if given is None:
    assert module.latent_scale not in (1, 0.75)
  else:
    assert module.latent_scale == given


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--format=lora",), "a run of scratch has no low-rank updates"),
    (("--layout=official",), "unknown layout 'official' of wan_dit"),
    (("--fields={",), "--fields is not valid JSON"),
    (("--fields=[1]",), "--fields: expected an object of fields, found list"),
    (("--fields=/gone.json",), "cannot read /gone.json: No such file"),
    (('--fields={"mean": [1]}',), "can be given are none, found mean"),
  ],
)
def test_bad_input(programs, run, tmp_path, flags, message):
  output = tmp_path / "new"
  done = programs.run(
    "launch.export", f"--workdir={run}", f"--output={output}", *flags
  )
  assert done.code == 2 and message in done.stderr
  assert done.stderr.count("\n") == 1
  assert not output.exists()
