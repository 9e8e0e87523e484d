"""The page of `dcvideogen app` in a headless Chromium.

    make test-app
    make screenshots

The server is a process of its own, with the tiny model. SCREENSHOTS names a
folder, into which the tests then put pictures of the page.
"""

import contextlib
import json
import re
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request

import pytest

from tests.app import browsing

api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

pytestmark = pytest.mark.app

PHOTO = browsing.ROOT / "docs" / "first_frame.png"
CHROMIUM = next(
  (x for x in map(shutil.which, ("chromium", "chromium-browser")) if x), None
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  page = browsing.Served(tmp_path_factory.mktemp("served"))
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
    page.set_default_timeout(browsing.SECONDS * 1000)
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


def test_a_video_grows_and_plays_and_its_command_makes_the_same(
  tab, served, tmp_path
):
  page = tab()
  browsing.shot(page, "start")
  browsing.fill(page, Frames=40, Steps=8)
  browsing.wait(page, "^40 tokens", "#estimate")
  browsing.watch(page)
  page.click("#make")
  done = browsing.wait(page, "^Done")
  print(f"first video after {time.monotonic() - served.started:.1f} s")
  assert browsing.plays(page) == pytest.approx(40 / 16, abs=0.1)
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
  browsing.wait(page, "about .* s", "#estimate")
  browsing.shot(page, "made")
  browsing.again(page, tmp_path)
  ours, theirs = (
    browsing.frames(served.output / name),
    browsing.frames(tmp_path / name),
  )
  assert ours.shape == (40, 64, 64, 3) and (ours == theirs).all()
  assert served.left() == []


def test_few_steps_belong_to_their_lora(tab, served, tmp_path):
  page, before = tab(), served.made()
  steps = page.get_by_label("Steps").first
  guidance = page.get_by_label("Guidance").first
  browsing.fill(page, Steps=2)
  page.get_by_label("few: 4 evaluations").check()
  browsing.wait(page, "LoRA: 4 evaluations without guidance", "#estimate")
  for field in (steps, guidance):
    api.expect(field).to_be_disabled(timeout=browsing.SECONDS * 1000)
  page.click("#make")
  browsing.wait(page, "^Done")
  assert browsing.plays(page)
  browsing.shot(page, "few")
  (name,) = (x for x in {*served.made()} - {*before} if x.endswith(".json"))
  made = (served.output / name).with_suffix(".mp4")
  report = json.loads((served.output / name).read_text())["settings"]
  assert report["steps"] == 4 and report["few"].startswith("few=own: 4")
  words = browsing.again(page, tmp_path)
  assert "--few" in words and not any("steps" in x for x in words)
  (theirs,) = tmp_path.glob("*.mp4")
  assert (browsing.frames(made) == browsing.frames(theirs)).all()
  browsing.upload(page, "#image", PHOTO)
  page.get_by_label("steps", exact=True).check()
  browsing.wait(page, "tokens", "#estimate")
  for field in (steps, guidance):
    api.expect(field).to_be_enabled(timeout=browsing.SECONDS * 1000)


def test_a_second_tab_works_beside_the_first(tab):
  first, second = tab(), tab()
  browsing.fill(first, Steps=2000)
  first.click("#make")
  browsing.wait(first, "^Step")
  second.click("#make")
  browsing.wait(second, "^Waiting for another run")
  browsing.fill(second, Frames=24)
  browsing.wait(second, "^24 tokens", "#estimate")
  browsing.shot(second, "waiting")
  assert browsing.wait(first, "^Step")
  browsing.shot(first, "steps")
  first.click("#cancel")
  browsing.wait(first, "^Cancelled")
  browsing.wait(second, "^Done")
  assert browsing.plays(second)


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
  browsing.fill(page, **fields)
  page.click("#make")
  page.wait_for_selector("#status .problem")
  assert browsing.told(page) == sentence
  if "Seeds" in fields:
    browsing.shot(page, "problem")
  assert served.made() == before and served.left() == []


def test_an_image_becomes_a_video(tab, served):
  page = tab()
  browsing.upload(page, "#image", PHOTO)
  page.wait_for_selector("#thumbnail img")
  assert "first_frame.png" in page.inner_text("#thumbnail")
  page.wait_for_selector("#command :text('--image=first_frame.png')")
  browsing.wait(page, "tokens", "#estimate")
  assert served.left() == []
  browsing.fill(page, Prompt="a large pink ring moves up over ocean", Steps=6)
  page.click("#make")
  browsing.wait(page, "^Done")
  assert browsing.plays(page)
  browsing.shot(page, "image")
  page.click("#no_image")
  page.wait_for_selector("#thumbnail img", state="detached")
  assert served.left() == []


def test_what_is_no_image_is_refused_and_removed(tab, served, tmp_path):
  page = tab()
  path = tmp_path / "text.png"
  path.write_text("no picture")
  browsing.upload(page, "#image", path)
  page.wait_for_selector("#status .problem")
  assert browsing.told(page) == (
    "Text.png is not an image, or its beginning is damaged."
  )
  assert served.left() == []


def test_cancel_leaves_nothing_behind(tab, served):
  page, before = tab(), served.made()
  browsing.fill(page, Steps=2000)
  page.click("#make")
  browsing.wait(page, "^Step")
  page.click("#cancel")
  assert browsing.wait(page, "^Cancelled") == "Cancelled. Nothing was kept."
  browsing.shot(page, "cancelled")
  assert served.made() == before and served.left() == []
  assert [x for x in served.output.iterdir() if x.name.startswith(".")] == []
  browsing.fill(page, Steps=2)
  page.click("#make")
  browsing.wait(page, "^Done")


def test_a_tab_that_is_closed_ends_its_run(tab, served):
  gone, page, before = tab(), tab(), len(served.made())
  browsing.fill(gone, Steps=2000)
  gone.click("#make")
  browsing.wait(gone, "^Step")
  browsing.fill(page, Steps=2)
  page.click("#make")
  browsing.wait(page, "^Waiting")
  gone.close()
  browsing.wait(page, "^Done")
  assert len(served.made()) == before + 3


def test_reconstruct(tab, served, tmp_path):
  page = tab()
  page.get_by_role("tab", name="Reconstruct").click()
  page.click("#reconstruct")
  figures = browsing.wait(page, "PSNR", "#figures")
  assert re.search(r"PSNR \d\d\.\d\d dB, SSIM 0\.\d+, 16 frames", figures)
  assert browsing.plays(page, "#side video")
  assert page.evaluate("document.querySelector('#maps img').naturalWidth") > 500
  browsing.shot(page, "reconstruct")
  path = tmp_path / "broken.mp4"
  path.write_bytes(
    (browsing.ROOT / "dcvideogen_jax/assets/demo.mp4").read_bytes()[:999]
  )
  browsing.upload(page, "#upload", path)
  browsing.wait(page, "broken.mp4", "#input")
  page.click("#reconstruct")
  page.wait_for_selector("#figures .problem")
  assert browsing.told(page, "#figures").startswith("Broken.mp4")
  browsing.upload(page, "#upload", PHOTO)
  browsing.wait(page, "first_frame.png", "#input")
  page.click("#reconstruct")
  page.wait_for_selector("#side img")
  assert "1 frame," in browsing.wait(page, "dB", "#figures")
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
