"""Every bad input is one sentence and exit code 2, and leaves no file."""

import json
import pickle
import subprocess
import sys
import zipfile

import av
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from tests.launch import launching


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  path = tmp_path_factory.mktemp("clip") / "in.mp4"
  return launching.write_video(path, launching.clip(9, 40, 64))


def require_one_sentence(finished, *words):
  assert finished.code == 2, finished.stderr
  lines = finished.stderr.splitlines()
  assert len(lines) == 1, finished.stderr
  assert lines[0].startswith("error: ")
  for word in words:
    assert word in lines[0]


def truncated(path, clip):
  path.write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])


def text(path, clip):
  path.write_text("this is no video\n" * 50)


def without_frames(path, clip):
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=12)
    stream.width = stream.height = 32
    container.start_encoding()


def corrupt_image(path, clip):
  PIL.Image.fromarray(launching.clip(1, 40, 40)[0]).save(path)
  data = bytearray(path.read_bytes())
  data[len(data) // 2 :] = data[: len(data) - len(data) // 2]
  path.write_bytes(data)


def missing(path, clip):
  pass


def folder(path, clip):
  path.mkdir()


@pytest.mark.parametrize(
  ("name", "make"),
  [
    ("in.mp4", truncated),
    ("in.mp4", text),
    ("in.mp4", without_frames),
    ("in.png", corrupt_image),
    ("in.png", text),
    ("in.mp4", missing),
    ("in.png", missing),
    ("in.mp4", folder),
  ],
)
def test_input(programs, model, clip, tmp_path, name, make):
  make(tmp_path / name, clip)
  before = sorted(tmp_path.rglob("*"))
  finished = programs.run(
    "launch.reconstruct",
    f"--model={model[0]}",
    f"--input={tmp_path / name}",
    f"--output={tmp_path / 'a' / 'b'}",
  )
  require_one_sentence(finished, name)
  assert sorted(tmp_path.rglob("*")) == before


class Malicious:
  """Leaves a file behind when it is unpickled."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return (open, (str(self._path), "w"))


def nan_weights(directory, state_dict):
  name = sorted(state_dict)[3]
  state_dict[name] = np.full_like(state_dict[name], np.nan)
  safetensors.numpy.save_file(state_dict, directory / "model.safetensors")
  return "NaN"


def missing_key(directory, state_dict):
  name = sorted(state_dict)[2]
  del state_dict[name]
  safetensors.numpy.save_file(state_dict, directory / "model.safetensors")
  return "missing"


def no_weights(directory, state_dict):
  safetensors.numpy.save_file({}, directory / "model.safetensors")
  return "holds no weights of dc_ae_v"


def not_an_object(directory, state_dict):
  safetensors.numpy.save_file(state_dict, directory / "model.safetensors")
  (directory / "config.json").write_text("[]")
  return "config.json"


def truncated_weights(directory, state_dict):
  path = directory / "model.safetensors"
  safetensors.numpy.save_file(state_dict, path)
  path.write_bytes(path.read_bytes()[:-100])
  return "whole"


def truncated_pt(directory, state_dict):
  archive(directory / "model.pt", pickle.dumps({}))
  data = (directory / "model.pt").read_bytes()
  (directory / "model.pt").write_bytes(data[: len(data) // 2])
  return "truncated"


def malicious_pt(directory, state_dict):
  archive(directory / "model.pt", pickle.dumps(Malicious(directory / "pwned")))
  return "refused"


def bare_malicious_pt(directory, state_dict):
  data = pickle.dumps(Malicious(directory / "pwned"))
  (directory / "model.pt").write_bytes(data)
  return "model.pt"


def archive(path, pickled):
  """A file in the format of `torch.save`."""
  with zipfile.ZipFile(path, "w") as z:
    z.writestr("archive/data.pkl", pickled)
    z.writestr("archive/data/0", bytes(4000))


@pytest.mark.parametrize("program", ["launch.reconstruct", "launch.convert"])
@pytest.mark.parametrize(
  "damage",
  [
    nan_weights,
    missing_key,
    no_weights,
    not_an_object,
    truncated_weights,
    truncated_pt,
    malicious_pt,
    bare_malicious_pt,
  ],
)
def test_weights(programs, model, clip, tmp_path, program, damage):
  directory = tmp_path / "model"
  directory.mkdir()
  config = (model[0] / "config.json").read_text()
  (directory / "config.json").write_text(config)
  state_dict = safetensors.numpy.load_file(model[0] / "model.safetensors")
  word = damage(directory, dict(state_dict))
  before = sorted(tmp_path.rglob("*"))
  arguments = {
    "launch.reconstruct": [f"--model={directory}", f"--input={clip}"],
    "launch.convert": [f"--source={directory}"],
  }
  finished = programs.run(
    program, *arguments[program], f"--output={tmp_path / 'out'}"
  )
  require_one_sentence(finished, word)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  ("flags", "word"),
  [
    (["--config=f32t4c64"], "expected"),
    (["--config=f99"], "f99"),
    (["--config={"], "JSON"),
    (['--config={"widths": [8, 8, 8]}'], "depths"),
    (['--config={"width": 8}'], "width"),
    (["--config=nowhere.json"], "nowhere.json"),
    (["--model=nowhere.pt"], "nowhere.pt"),
    (["--frames_rule=official"], "multiple of 4"),
    (["--memory_budget_gib=0.001", "--width=2000"], "GiB"),
    (["stray"], "stray"),
  ],
)
def test_settings(programs, model, clip, tmp_path, flags, word):
  finished = programs.run(
    "launch.reconstruct",
    f"--model={model[0]}",
    f"--input={clip}",
    f"--output={tmp_path / 'out'}",
    *flags,
  )
  require_one_sentence(finished, word)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "field",
  [
    {"latent_channels": "4"},
    {"latent_channels": 4.0},
    {"chunk_frames": 0},
    {"temporal_factor": 0},
    {"widths": [8, None, 8]},
    {"widths": 8},
    {"name": "mine"},
  ],
)
def test_fields(programs, model, tmp_path, field):
  finished = programs.run(
    "launch.convert",
    f"--source={model[0]}",
    f"--config={json.dumps({**launching.CONFIG, **field})}",
    f"--output={tmp_path / 'out'}",
  )
  require_one_sentence(finished, *field)
  assert not list(tmp_path.iterdir())


def test_wrong_variant_is_told_in_names(programs, model, tmp_path):
  config = {**launching.CONFIG, "depths": [0, 2, 1]}
  finished = programs.run(
    "launch.convert",
    f"--source={model[0]}",
    f"--config={json.dumps(config)}",
    f"--output={tmp_path / 'out'}",
  )
  for half in ("encoder", "decoder"):
    require_one_sentence(finished, f"{half}.stages.1.op_list.2.main.conv")


@pytest.mark.parametrize("output", ["file/out", "file/a/b/out", "file"])
@pytest.mark.parametrize("program", ["launch.reconstruct", "launch.convert"])
def test_output_below_a_file(programs, model, clip, tmp_path, program, output):
  (tmp_path / "file").write_text("in the way")
  finished = programs.run(
    program,
    *(
      [f"--model={model[0]}", f"--input={clip}"]
      if program == "launch.reconstruct"
      else [f"--source={model[0]}"]
    ),
    f"--output={tmp_path / output}",
  )
  require_one_sentence(finished, "file")
  assert (tmp_path / "file").read_text() == "in the way"
  assert len(list(tmp_path.rglob("*"))) == 1


# The videos take about 20 kB each, the contact sheet 100 kB and the weights
# 170 kB.
@pytest.mark.parametrize(
  ("program", "output", "limit"),
  [
    ("launch.reconstruct", "out", 3_000),
    ("launch.reconstruct", "out", 50_000),
    ("launch.convert", "out", 20_000),
    ("launch.convert", "out.safetensors", 20_000),
    pytest.param("launch.convert", "out.pt", 20_000, marks=pytest.mark.parity),
  ],
)
def test_full_disk(programs, model, clip, tmp_path, program, output, limit):
  finished = programs.run(
    program,
    *(
      [f"--model={model[0]}", f"--input={clip}"]
      if program == "launch.reconstruct"
      else [f"--source={model[0]}"]
    ),
    f"--output={tmp_path / output}",
    largest_file=limit,
  )
  require_one_sentence(finished, "cannot write")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "flags",
  [
    ["--input=in.mp4", "--model=nowhere"],
    ["--input=in.mp4", "--no_such_flag"],
    [],
  ],
)
def test_exit_code_of_the_real_command(tmp_path, clip, flags):
  (tmp_path / "in.mp4").write_bytes(clip.read_bytes())
  finished = subprocess.run(
    [
      sys.executable,
      "-m",
      "launch.reconstruct",
      f"--output={tmp_path / 'out'}",
      *flags,
    ],
    cwd=tmp_path,
    env={"PYTHONPATH": str(launching.ROOT), "PATH": "", "HOME": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 2
  assert "Traceback" not in finished.stderr
  assert not (tmp_path / "out").exists()
