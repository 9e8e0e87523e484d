"""A whole export for VBench: stopped, continued, and checked."""

import json
import signal

import pytest

from dcvideogen_jax.data import video
from tests.train import killing

ROWS = [
  {
    "prompt_en": "In a still frame, a ball",
    "dimension": ["temporal_flickering"],
  },
  {"prompt_en": "a ring, by Hokusai", "dimension": ["appearance_style"]},
]
TEXTS = ["a red ball on black", "a blue ring moves left"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lists")
  (folder / "list.json").write_text(json.dumps(ROWS))
  (folder / "texts.txt").write_text("\n".join(TEXTS))
  return (
    f"--vbench={folder / 'list.json'}",
    f"--vbench_augmented={folder / 'texts.txt'}",
    "--vbench_samples=2",
    "--vbench_seeds=numbered",
    "--config.height=32",
    "--config.width=32",
    "--config.frames=8",
  )


@pytest.fixture(scope="module")
def export(programs, flags, tmp_path_factory):
  """Stopped by SIGTERM after the first of four videos, then continued."""
  output = tmp_path_factory.mktemp("out")
  command = ("launch.sample", f"--output={output}", "--config.steps=2", *flags)
  process = killing.start(command, programs.cache)
  lines = []
  for line in process.stdout:
    lines.append(line)
    if ".mp4: " in line:
      process.send_signal(signal.SIGTERM)
      break
  code, _, err = killing.finish(process)
  assert code == 143, err
  assert "4 videos; 0 are there, 4 to make" in lines[0]
  stopped = {x.stem for x in (output / "videos").iterdir()}
  outs = []
  for more in (("--processes=2", "--process=1"), ()):
    finished = programs.run(*command, *more)
    assert finished.code == 0, finished.stderr
    outs.append(finished.stdout)
  return output, stopped, outs


def test_a_stopped_export_goes_on(export):
  output, stopped, (second, last) = export
  names = [f"{row['prompt_en']}-{k}" for row in ROWS for k in range(2)]
  made = [name for name in names if name in stopped]
  assert made == names[: len(made)] and 0 < len(made) < 4
  # The second of two processes has the second and the fourth video.
  theirs = [name for name in names[1::2] if name not in made]
  there, left = 2 - len(theirs), len(theirs)
  told = f"4 videos, of which 2 here; {there} are there, {left} to make"
  assert told in second and f"1 of {left}: {theirs[0]}\n" in second
  left = [name for name in names if name not in {*made, *theirs}]
  assert f"4 videos; {4 - len(left)} are there, {len(left)} to make" in last
  assert all(f": {name}\n" in last for name in left) and names[3] not in last
  found = sorted(x.relative_to(output).as_posix() for x in output.rglob("*.*"))
  assert found == sorted(
    [f"settings/{x}.json" for x in names] + [f"videos/{x}.mp4" for x in names]
  )
  for i, name in enumerate(names):
    report = json.loads((output / "settings" / f"{name}.json").read_text())
    settings = report["settings"]
    row, sample = divmod(i, 2)
    assert settings["prompts"] == [TEXTS[row]]
    assert settings["seeds"] == [100_000 * row + sample]
    assert settings["vbench"]["prompt"] == ROWS[row]["prompt_en"]
    info = video.probe(output / "videos" / f"{name}.mp4")
    assert (info.frames, info.height, info.width) == (8, 32, 32)
    assert json.loads(info.comment)["seeds"] == settings["seeds"]


def test_the_folder_is_checked(programs, export, flags, tmp_path):
  report = tmp_path / "report.json"
  command = (
    "launch.evaluate",
    "--what=vbench-folder",
    f"--folder={export[0]}",
    f"--output={report}",
    flags[0],
  )
  finished = programs.run(*command, "--vbench_samples=2", "--every_frame")
  assert finished.code == 0, finished.stderr
  assert "4 of 4 videos, 8 x 32 x 32, 16 fps" in finished.stdout
  assert finished.stdout.endswith("complete\n") and not finished.stderr
  finished = programs.run(*command)
  assert finished.code == 2
  assert finished.stderr.endswith("is not complete: 26 missing\n")
  assert "  temporal_flickering: 2 of 25\n" in finished.stdout
  assert len(json.loads(report.read_text())["missing"]) == 26
  finished = programs.run(*command[:-1])
  assert finished.code == 2 and "--vbench is missing" in finished.stderr


def test_other_settings_need_another_folder(programs, export, flags):
  command = ("launch.sample", f"--output={export[0]}", *flags)
  finished = programs.run(*command, "--config.steps=3")
  assert finished.code == 2 and "made with steps 2, now 3" in finished.stderr
  finished = programs.run(*command, "--config.steps=2")
  assert finished.code == 0, finished.stderr
  assert "4 are there, 0 to make" in finished.stdout
  assert "loading" not in finished.stdout


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (("--prompt=a cat",), "--prompt does not go with --vbench"),
    (("--noise=x.npy",), "--noise does not go with --vbench"),
    (("--seeds=1,2",), "--vbench takes one number in --seeds, found 1,2"),
    (("--vbench_ratio=1-1",), "--vbench_ratio goes with --vbench_images only"),
    (("--vbench_images=x",), "--vbench_ratio=WIDTH-HEIGHT, such as 16-9"),
    (("--vbench=gone.json",), "cannot read"),
    (("--vbench_dimensions=color",), "has no prompts of the dimension color"),
  ],
)
def test_bad_flags(programs, flags, tmp_path, more, message):
  output = f"--output={tmp_path / 'out'}"
  finished = programs.run("launch.sample", output, *flags, *more)
  assert finished.code == 2
  assert message in finished.stderr
  assert finished.stderr.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_flags_of_vbench_alone(programs, flags, tmp_path):
  finished = programs.run("launch.sample", f"--output={tmp_path}", flags[3])
  assert finished.code == 2
  assert "--vbench_seeds goes with --vbench only" in finished.stderr
