"""What the page does without Gradio: forms, runs, previews, tabs, history."""

import json
import pathlib
import shlex
import threading
import time
import types

import jax
import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.app import (
  estimates,
  forms,
  history,
  previews,
  runs,
  serve,
  snippets,
  studio,
  tabs,
)
from dcvideogen_jax.data import video
from dcvideogen_jax.plan import fits, formulas
from dcvideogen_jax.sample import generation, presets, sizes

SERVED = forms.Served("tiny", ("--lora=a b,0.5",), "out/app")
FORM = forms.Form("a cat's day", "", 16, 64, 64, 20, 3.0, "0, 7")
NEEDS = formulas.Needs(16, 10**9, 2**20, 10**8, 2**20, 0)


def test_the_command_has_what_differs_from_the_preset():
  line = forms.command(SERVED, FORM)
  assert shlex.split(line.replace("\\\n", " ")) == [
    *("dcvideogen", "sample", "--config=tiny", "--lora=a b,0.5"),
    *("--prompt=a cat's day", "--seeds=0,7", "--output=out"),
  ]
  assert max(map(len, line.splitlines())) <= 80
  changed = FORM._replace(
    frames=24.0, steps=5, negative_prompt="blurred", image="my cat.png"
  )
  words = shlex.split(forms.command(SERVED, changed).replace("\\\n", " "))
  assert words[4:-2] == [
    *("--frames=24", "--config.steps=5", "--config.negative_prompt=blurred"),
    *("--prompt=a cat's day", "--image=my cat.png"),
  ]
  c = forms.config(SERVED, changed)
  assert (c.frames, c.steps, c.task) == (24, 5, "i2v")
  assert c.negative_prompt == "blurred"
  assert forms.config(SERVED, FORM) == presets.get_config("tiny")


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"height": None}, "height"),
    ({"frames": 1.5}, "frames"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"steps": 10**9}, "steps must be at most 10000"),
    ({"guidance_scale": None}, "guidance_scale"),
    ({"prompt": "\n"}, "prompt is empty"),
    ({"prompt": "a\0b"}, "NUL"),
    ({"seeds": "1,,2"}, "a seed is a whole number"),
    ({"seeds": "-1"}, "a seed is a whole number"),
    ({"way": "none"}, "way must be one of"),
  ],
)
def test_fields_that_do_not_fit(change, sentence):
  form = FORM._replace(**change)
  with pytest.raises(errors.UserError, match=sentence):
    c = forms.config(SERVED, form)
    forms.requests(form, c.task)
    estimates.of(None, c)


def test_a_request_for_each_seed():
  found = forms.requests(FORM, "t2v")
  assert [request.seed for request in found] == [0, 7]
  assert found[0].prompt == "a cat's day" and found[0].image is None
  forms.requests(FORM._replace(image="a.png"), "i2v")


def events(run):
  return [*run.events()]


def test_runs_take_turns_in_their_order():
  turns, order, go = runs.Turns(), [], threading.Event()

  def work(name):
    def worked(run):
      order.append(name)
      go.wait(10)
      run.tell(runs.Progress("step", 1, 2))
      return name

    return worked

  first = runs.Run(work("a"), turns)
  while not order:
    time.sleep(0.01)
  second = runs.Run(work("b"), turns)
  assert next(second.events()) == runs.Waiting(1)
  go.set()
  assert events(first)[-1] == runs.Ended("a")
  assert events(second)[-1] == runs.Ended("b")
  assert order == ["a", "b"]


def test_what_a_run_freed_is_returned(monkeypatch):
  trimmed = []
  monkeypatch.setattr(runs.memory, "trim", lambda: trimmed.append(1))
  events(runs.Run(lambda run: "a", runs.Turns()))
  assert trimmed == [1]


@pytest.mark.parametrize("waits", [True, False])
def test_a_run_that_is_cancelled_lets_the_next_one_run(waits):
  turns, begun, go = runs.Turns(), threading.Event(), threading.Event()

  def work(run):
    begun.set()
    while not go.wait(0.01):
      run.tell(runs.Stage("x"))

  first = runs.Run(work, turns)
  begun.wait(10)
  second = runs.Run(lambda run: "b", turns)
  third = runs.Run(lambda run: "c", turns)
  (second if waits else first).cancel()
  if waits:
    assert events(second)[-1].problem == "Cancelled. Nothing was kept."
    go.set()
    assert events(first)[-1] == runs.Ended()
  else:
    assert events(first)[-1].problem.startswith("Cancelled")
    assert events(second)[-1] == runs.Ended("b")
  assert events(third)[-1] == runs.Ended("c")


@pytest.mark.parametrize(
  ("error", "sentence"),
  [
    (errors.UserError("no such size"), "no such size"),
    (RuntimeError("RESOURCE_EXHAUSTED: x\ny"), "The device is out of memory"),
    (MemoryError(), "The host is out of memory"),
    (OSError(28, "No space left"), "The disk takes no more: No space left"),
    (KeyError("x"), "A bug (KeyError: 'x')"),
  ],
)
def test_an_error_of_a_run_is_a_sentence(error, sentence):
  def work(run):
    raise error

  (ended,) = events(runs.Run(work, runs.Turns()))
  assert ended.result is None and ended.problem.startswith(sentence)


def test_a_preview_has_all_frames_so_far(tmp_path):
  random = np.random.default_rng(0)
  steps = np.arange(24)[:, None, None, None]
  noise = random.integers(0, 30, (24, 32, 48, 1)).repeat(3, -1)
  clip = (8 * steps + noise).astype(np.uint8)
  growing = previews.GrowingVideo(tmp_path)
  for first, count in ((0, 8), (8, 3), (11, 13)):
    path = growing.add(clip[first : first + count])
    info = video.probe(path)
    assert (info.frames, info.fps) == (first + count, generation.FPS)
  found = np.stack(list(video.read_frames(path))).astype(int)
  assert np.abs(found - clip).mean() < 6
  assert np.abs(np.diff(found.mean((1, 2, 3))) - 8).max() < 2


def test_a_result_that_is_watched_is_the_same():
  pieces = [np.full((1, n, 2, 2, 3), n, np.uint8) for n in (3, 1)]
  made = generation.Generation(
    jax.numpy.zeros((1, 1, 1, 1, 1)),
    sizes.Size(4, 2, 2),
    {},
    lambda latents: iter(pieces),
  )
  seen = []
  assert made.watched(seen.append).video().shape == (1, 4, 2, 2, 3)
  assert [x.shape[1] for x in seen] == [3, 1]


def request(name):
  return types.SimpleNamespace(session_hash=name)


def uploaded(folder, name, content):
  path = folder / "uploads" / "0123" / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  return {"path": str(path)}


def test_uploads_are_read_and_removed(tmp_path):
  opened = tabs.Tabs(tmp_path)
  tab = opened.of(request("a"))
  assert opened.of(request("a")) is tab and opened.of(request("b")) is not tab
  image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
  upload = uploaded(tmp_path, "my photo.png", b"")
  PIL.Image.fromarray(image).save(upload["path"])
  tab.take_image(upload)
  assert (tab.image == image).all() and tab.image_name == "my photo.png"
  with pytest.raises(errors.UserError, match="^no.png is not an image"):
    tab.take_image(uploaded(tmp_path, "no.png", b"text"))
  tab.take_video(uploaded(tmp_path, "a.mp4", b"1"))
  tab.take_video(uploaded(tmp_path, "b.mp4", b"2"))
  left = [x for x in tmp_path.rglob("*") if x.is_file()]
  assert left == [tab.video] and tab.video.read_bytes() == b"2"
  assert tab.video_name == "b.mp4"
  problem = tab.about_upload(errors.UserError(f"{tab.video} is damaged"))
  assert problem == "b.mp4 is damaged"
  cancelled = []
  tab.run = types.SimpleNamespace(cancel=lambda: cancelled.append(1))
  opened.close(request("a"))
  opened.close(request("never there"))
  assert len(opened) == 1 and cancelled and tab.image is None
  assert [x for x in tmp_path.rglob("*") if x.is_file()] == []


def test_a_browser_cannot_name_a_file_of_this_machine(tmp_path):
  (tmp_path / "uploads").mkdir()
  secret = tmp_path / "secret.png"
  secret.write_bytes(b"x")
  tab = tabs.Tabs(tmp_path).of(request("a"))
  for path in (secret, tmp_path / "uploads" / ".." / "secret.png"):
    with pytest.raises(errors.UserError, match="secret.png is no upload"):
      tab.take_image({"path": str(path)})
  assert secret.exists()


def report(directory, name, **changes):
  settings = {
    "prompts": ["<b>rain</b>"],
    "seeds": [3],
    **{"frames": 16, "height": 64, "width": 96, "steps": 20},
    "command": "dcvideogen sample",
  }
  told = {"settings": settings | changes, "seconds": {"total": 2.345}}
  (directory / f"{name}.json").write_text(json.dumps(told))
  (directory / f"{name}.mp4").write_bytes(b"")


def test_history_is_what_lies_in_the_folder(tmp_path):
  report(tmp_path, "00000_a")
  report(tmp_path, "00001_b", seeds=None)
  (tmp_path / "other.json").write_text("[]")
  (tmp_path / "other.mp4").write_bytes(b"")
  (tmp_path / "alone.json").write_text("{}")
  newest, oldest = history.made(tmp_path)
  assert (newest.name, oldest.name) == ("00001_b", "00000_a")
  assert (oldest.size, oldest.seed) == ("16 x 64 x 96", "3")
  assert (oldest.seconds, newest.seed) == ("2.3", "")
  assert len(history.made(tmp_path, most=1)) == 1
  assert history.made(tmp_path / "nowhere") == []
  assert history.is_made(tmp_path, "00000_a.mp4")
  for name in ("00000_a.json", "../x.mp4", ".a.mp4", "b.mp4", "alone.txt"):
    assert not history.is_made(tmp_path, name)
  cards = snippets.cards([newest, oldest])
  assert "<b>" not in cards and "&lt;b&gt;rain" in cards
  assert studio.next_index(tmp_path) == 2
  assert studio.next_index(pathlib.Path(__file__).parent) == 0


def test_seconds_are_those_of_the_last_video():
  speeds = estimates.Speeds()
  assert speeds.seconds(NEEDS, 10) is None
  speeds.measure(NEEDS, 10, {"denoise": 5.0, "decode": 0.5, "other": 9.0})
  assert speeds.seconds(NEEDS, 10) == pytest.approx(5.5)
  twice = NEEDS._replace(step_flops=2 * 10**9)
  assert speeds.seconds(twice, 20) == pytest.approx(20.5)
  wan = NEEDS._replace(decode_flops=None)
  assert speeds.seconds(wan, 10) == pytest.approx(5.0)


@pytest.mark.parametrize(
  ("seconds", "told"),
  [(0.44, "0.4 s"), (12.3, "12 s"), (240, "4 min"), (9000, "2.5 h")],
)
def test_durations(seconds, told):
  assert estimates.duration(seconds) == told


def test_a_port_that_is_taken():
  with serve.listen("127.0.0.1", None) as taken:
    port = taken.getsockname()[1]
    assert port in serve.PORTS
    with pytest.raises(errors.UserError, match=f"port {port}: Address already"):
      serve.listen("127.0.0.1", port)
    with serve.listen("127.0.0.1", None) as other:
      assert other.getsockname()[1] != port
  with pytest.raises(errors.UserError, match="cannot listen on nowhere"):
    serve.listen("nowhere.invalid", 7999)


def test_without_gradio_there_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "gradio", None)
  with pytest.raises(errors.UserError, match=r"dcvideogen_jax\[app\]"):
    serve.prepare(tmp_path)


def test_memory_that_is_not_there_is_told(monkeypatch):
  monkeypatch.setattr(estimates, "of", lambda parts, c: NEEDS)
  weights = {"transformer": 3 * 2**30, "autoencoder": 2**30}
  monkeypatch.setattr(formulas, "weights", lambda parts: weights)
  c = forms.config(SERVED, FORM._replace(height=65))
  device = fits.Device("gpu", 2**30, {"bfloat16": 1e9}, 1e30)
  line = estimates.told(None, c, 2, device, estimates.Speeds())
  assert line == (
    "16 tokens · 4.0 GiB of memory, 4.0 GiB of it weights: more than the 1.0"
    " GiB that are free · 20 s or more · browsers do not play videos of an odd"
    " height or width"
  )
  speeds = estimates.Speeds()
  speeds.measure(NEEDS, 20, {"denoise": 3.0, "decode": 1.0})
  line = estimates.told(None, c, 2, device, speeds)
  assert "about 4.0 s each, 8.0 s for 2" in line
  c = forms.config(SERVED, FORM._replace(way="few"))
  line = estimates.told(None, c, 2, device, speeds)
  assert "about 1.6 s each, 3.2 s for 2" in line
  assert line.endswith("few-step LoRA: 4 evaluations without guidance")
