"""The benchmark program on a tiny model."""

import json

from tests.launch import launching


def test_writes_what_it_prints(programs, tmp_path):
  output = tmp_path / "new" / "report.json"
  finished = programs.run(
    "launch.benchmark",
    "--what=reconstruct",
    f"--output={output}",
    f"--config={json.dumps(launching.CONFIG)}",
    "--frames=8",
    "--height=4",
    "--width=6",
    "--threads=1",
    "--sides=jax",
  )
  assert finished.code == 0, finished.stderr
  report = json.loads(output.read_text())
  assert report["clip"] == [1, 8, 4, 6]
  assert report["threads"] == 1
  (seconds,) = report["sides"]["jax"]["calls"]["encode"]["s"]
  assert f"| encode, s | {seconds:.2f} |" in finished.stdout
  assert output.with_suffix(".md").read_text() in finished.stdout
  assert f"wrote {output}" in finished.stdout


def test_bad_input_is_one_sentence(programs, tmp_path):
  output = tmp_path / "out.json"
  output.write_text("[]")
  for flags, words in (
    (["--what=conv3d"], "is no table of measurements"),
    (["--sides=jax,numpy"], "found numpy"),
    (["--config=f16t4c16"], "found 'f16t4c16'"),
    (["--frames=39"], "multiple of 40 frames"),
    (["--what=attention", "--sides=jax"], "--sides is not for --what=att"),
    (["--what=conv3d", "--threads=2"], "--threads is not for --what=conv3d"),
    (["--what=load", "--warm_up"], "--warm_up is not for --what=load"),
  ):
    finished = programs.run("launch.benchmark", f"--output={output}", *flags)
    assert finished.code == 2, finished.stderr
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
    assert words in finished.stderr
    assert output.read_text() == "[]"
