"""The page of `dcvideogen app` in a headless Chromium.

    make test-app
    make screenshots

The server is a process of its own, with the tiny model. SCREENSHOTS names a
folder, into which the tests then put pictures of the page.
"""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

pytestmark = pytest.mark.app

ROOT = pathlib.Path(__file__).parents[2]
PHOTO = ROOT / "docs" / "first_frame.png"
PROGRAM = [
  sys.executable,
  "-c",
  "from dcvideogen_jax.programs import cli; cli.main()",
]
CHROMIUM = next(
  (x for x in map(shutil.which, ("chromium", "chromium-browser")) if x), None
)
SECONDS = 300  # Longest time to wait, as other programs may be busy.


class Served:
  """The running page.

  Attributes:
    url: its address.
    output: folder of its videos.
    temporary: folder in which its scratch folder is.
    started: when it was started, by `time.monotonic`.
  """

  def __init__(self, directory):
    self.output = directory / "out"
    self.temporary = directory / "tmp"
    self.temporary.mkdir()
    self.started = time.monotonic()
    self._errors = (directory / "stderr").open("w+")
    self.process = subprocess.Popen(
      [*PROGRAM, "app", "--config=tiny", f"--output={self.output}"],
      env={**os.environ, "TMPDIR": str(self.temporary)},
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
    )
    told = []
    for line in self.process.stdout:
      told.append(line)
      if line.startswith("http"):
        break
    else:
      raise RuntimeError("".join(told) + self.errors())
    self.url = line.strip()

  def errors(self):
    self._errors.seek(0)
    return self._errors.read()

  def left(self):
    """Files of uploads and previews that are there now."""
    return [x for x in self.temporary.rglob("*") if x.is_file()]

  def made(self):
    return sorted(x.name for x in self.output.glob("*") if x.is_file())

  def stop(self, number=signal.SIGINT):
    self.process.send_signal(number)
    return self.process.wait(30)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  page = Served(tmp_path_factory.mktemp("served"))
  yield page
  if page.process.poll() is None:
    page.stop()


@pytest.fixture(scope="module")
def browser():
  if CHROMIUM is None:
    pytest.fail("there is no chromium: apt-get install chromium")
  with api.sync_playwright() as playwright:
    options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
    yield browser
    browser.close()


@pytest.fixture
def tab(browser, served):
  """Opens tabs, and sees that no tab asks another machine for anything."""
  asked = []

  def opened():
    page = browser.new_page(viewport={"width": 1200, "height": 860})
    page.set_default_timeout(SECONDS * 1000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.url)
    page.wait_for_selector("#estimate .told")
    return page

  pages = []
  yield lambda: pages.append(opened()) or pages[-1]
  for page in pages:
    page.close()
  foreign = [
    url for url in asked if not url.startswith((served.url, "data:", "blob:"))
  ]
  assert foreign == []


def shot(page, name):
  """Writes a picture of the page if it is asked for."""
  if folder := os.environ.get("SCREENSHOTS"):
    page.wait_for_timeout(700)
    page.screenshot(path=f"{folder}/app_{name}.png", full_page=True)


def fill(page, **fields):
  for label, value in fields.items():
    page.get_by_label(label, exact=False).first.fill(str(value))
    page.keyboard.press("Tab")


def told(page, where="#status"):
  found = page.locator(f"{where} .told")
  return found.inner_text() if found.count() else ""


def wait(page, pattern, where="#status"):
  """Waits until the status matches a pattern; returns it."""
  page.wait_for_function(
    "([where, pattern]) => new RegExp(pattern).test("
    "document.querySelector(where + ' .told')?.innerText ?? '')",
    arg=[where, pattern],
  )
  return told(page, where)


def watch(page):
  """Notes every address that the player and the status line show."""
  page.evaluate(
    """() => {
      window.seen = [];
      const look = () => {
        for (const x of [document.querySelector('#video video')?.src,
                         document.querySelector('#status .told')?.innerText])
          if (x && !window.seen.includes(x)) window.seen.push(x);
      };
      new MutationObserver(look).observe(
        document.body, {subtree: true, childList: true, attributes: true});
    }"""
  )


def plays(page, where="#video video"):
  """The seconds of a video that runs in the page."""
  page.wait_for_function(
    "where => document.querySelector(where)?.currentTime > 0.05", arg=where
  )
  return page.evaluate("where => document.querySelector(where).duration", where)


def frames(path):
  import numpy as np

  from dcvideogen_jax.data import video

  return np.stack(list(video.read_frames(path)))


def test_a_video_grows_and_plays_and_its_command_makes_the_same(
  tab, served, tmp_path
):
  page = tab()
  shot(page, "start")
  fill(page, Frames=40, Steps=8)
  wait(page, "^40 tokens", "#estimate")
  watch(page)
  page.click("#make")
  done = wait(page, "^Done")
  print(f"first video after {time.monotonic() - served.started:.1f} s")
  assert plays(page) == pytest.approx(40 / 16, abs=0.1)
  seen = page.evaluate("window.seen")
  previews = [x for x in seen if "/preview/" in x]
  assert len(previews) >= 2 and "/made/00000_a-large" in seen[-1] + seen[-2]
  steps = [x for x in seen if re.match(r"Step \d of 8", x)]
  assert len(steps) >= 2
  assert any(x.startswith("Decoding: frame") for x in seen)
  (name,) = (x for x in served.made() if x.endswith(".mp4"))
  assert f"{served.output / name}" in done
  stem = name.removesuffix(".mp4")
  assert served.made() == [f"{stem}.{x}" for x in ("json", "mp4", "png")]
  page.wait_for_selector("#history video")
  wait(page, "about .* s", "#estimate")
  shot(page, "made")
  command = page.locator("#command pre").inner_text()
  words = shlex.split(command.replace("\\\n", " "))
  assert words[:2] == ["dcvideogen", "sample"] and words[-1] == "--output=out"
  again = [*PROGRAM, *words[1:-1], f"--output={tmp_path}"]
  subprocess.run(again, cwd=ROOT, check=True, capture_output=True)
  ours, theirs = frames(served.output / name), frames(tmp_path / name)
  assert ours.shape == (40, 64, 64, 3) and (ours == theirs).all()
  assert served.left() == []


def test_a_second_tab_works_beside_the_first(tab):
  first, second = tab(), tab()
  fill(first, Steps=150)
  first.click("#make")
  wait(first, "^Step")
  second.click("#make")
  wait(second, "^Waiting for another run")
  fill(second, Frames=24)
  wait(second, "^24 tokens", "#estimate")
  shot(second, "waiting")
  assert wait(first, "^Step")
  shot(first, "steps")
  wait(first, "^Done")
  wait(second, "^Done")
  assert plays(first) and plays(second)


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"Prompt": " "}, "The prompt is empty: say what the video shows."),
    ({"Height": 0}, "Height must be at least 1, found 0."),
    ({"Frames": ""}, "Frames must be at least 1, found None."),
    ({"Width": 99999}, "Width must be at most 65536, found 99999."),
    ({"Steps": -3}, "Steps must be at least 1, found -3."),
    (
      {"Seeds": "0, x"},
      "A seed is a whole number from 0 to 4294967295, found 'x'.",
    ),
  ],
)
def test_bad_input_gets_its_sentence(tab, served, fields, sentence):
  page, before = tab(), served.made()
  fill(page, **fields)
  page.click("#make")
  page.wait_for_selector("#status .problem")
  assert told(page) == sentence
  if "Seeds" in fields:
    shot(page, "problem")
  assert served.made() == before and served.left() == []


def upload(page, button, path):
  with page.expect_file_chooser() as chooser:
    page.click(button)
  chooser.value.set_files(path)


def test_an_image_becomes_a_video(tab, served):
  page = tab()
  upload(page, "#image", PHOTO)
  page.wait_for_selector("#thumbnail img")
  assert "first_frame.png" in page.inner_text("#thumbnail")
  wait(page, "tokens", "#estimate")
  assert "--image=first_frame.png" in page.inner_text("#command")
  assert served.left() == []
  fill(page, Prompt="a large pink ring moves up over ocean", Steps=6)
  page.click("#make")
  wait(page, "^Done")
  assert plays(page)
  shot(page, "image")
  page.click("#no_image")
  page.wait_for_selector("#thumbnail img", state="detached")
  assert served.left() == []


def test_what_is_no_image_is_refused_and_removed(tab, served, tmp_path):
  page = tab()
  path = tmp_path / "text.png"
  path.write_text("no picture")
  upload(page, "#image", path)
  page.wait_for_selector("#status .problem")
  assert told(page) == (
    "Text.png is not an image, or its beginning is damaged."
  )
  assert served.left() == []


def test_cancel_leaves_nothing_behind(tab, served):
  page, before = tab(), served.made()
  fill(page, Steps=2000)
  page.click("#make")
  wait(page, "^Step")
  page.click("#cancel")
  assert wait(page, "^Cancelled") == "Cancelled. Nothing was kept."
  shot(page, "cancelled")
  assert served.made() == before and served.left() == []
  assert [x for x in served.output.iterdir() if x.name.startswith(".")] == []
  fill(page, Steps=2)
  page.click("#make")
  wait(page, "^Done")


def test_a_tab_that_is_closed_ends_its_run(tab, served):
  gone, page, before = tab(), tab(), len(served.made())
  fill(gone, Steps=2000)
  gone.click("#make")
  wait(gone, "^Step")
  fill(page, Steps=2)
  page.click("#make")
  wait(page, "^Waiting")
  gone.close()
  wait(page, "^Done")
  assert len(served.made()) == before + 3


def test_reconstruct(tab, served, tmp_path):
  page = tab()
  page.get_by_role("tab", name="Reconstruct").click()
  page.click("#reconstruct")
  figures = wait(page, "PSNR", "#figures")
  assert re.search(r"PSNR \d\d\.\d\d dB, SSIM 0\.\d+, 16 frames", figures)
  assert plays(page, "#side video")
  assert page.evaluate("document.querySelector('#maps img').naturalWidth") > 500
  shot(page, "reconstruct")
  path = tmp_path / "broken.mp4"
  path.write_bytes((ROOT / "dcvideogen_jax/assets/demo.mp4").read_bytes()[:999])
  upload(page, "#upload", path)
  wait(page, "broken.mp4", "#input")
  page.click("#reconstruct")
  page.wait_for_selector("#figures .problem")
  assert told(page, "#figures").startswith("Broken.mp4")
  upload(page, "#upload", PHOTO)
  wait(page, "first_frame.png", "#input")
  page.click("#reconstruct")
  page.wait_for_selector("#side img")
  assert "1 frame," in wait(page, "dB", "#figures")
  page.close()
  deadline = time.monotonic() + 20
  while served.left() and time.monotonic() < deadline:
    time.sleep(0.2)
  assert served.left() == []


@pytest.mark.parametrize(
  "path",
  [
    "made/..%2F..%2Fetc%2Fpasswd",
    "made/.hidden.mp4",
    "made/nothing.mp4",
    "preview/..%2Fx/y.mp4",
    "reconstruction/../x/metrics.json",
    "gradio_api/file=/etc/passwd",
    "docs",
  ],
)
def test_other_files_are_not_served(served, path):
  with pytest.raises(urllib.error.HTTPError) as refused:
    urllib.request.urlopen(f"{served.url}/{path}")
  assert refused.value.code in (403, 404)


def test_other_machines_are_not_served(served):
  port = int(served.url.rpartition(":")[2])
  address = socket.gethostbyname(socket.gethostname())
  if address.startswith("127."):
    address = "127.0.0.2"
  with contextlib.closing(socket.socket()) as other, pytest.raises(OSError):
    other.settimeout(3)
    other.connect((address, port))


def test_an_interrupt_ends_the_page(served):
  assert served.stop() == 128 + signal.SIGINT
  assert [*served.temporary.glob("dcvideogen_app_*")] == []
  assert "Traceback" not in served.errors()
