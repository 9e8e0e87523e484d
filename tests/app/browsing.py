"""Starts the page of `dcvideogen app`, and looks at it as a user does."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import numpy as np

from dcvideogen_jax.data import video

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 300  # Longest time to wait, as other programs may be busy.
PROGRAM = [
  sys.executable,
  "-c",
  "from dcvideogen_jax.programs import cli; cli.main()",
]


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
  return np.stack(list(video.read_frames(path)))


def again(page, output):
  """Runs the command line that the page shows; returns its words."""
  command = page.locator("#command pre").inner_text()
  words = shlex.split(command.replace("\\\n", " "))
  assert words[:2] == ["dcvideogen", "sample"] and words[-1] == "--output=out"
  program = [*PROGRAM, *words[1:-1], f"--output={output}"]
  subprocess.run(program, cwd=ROOT, check=True, capture_output=True)
  return words


def upload(page, button, path):
  with page.expect_file_chooser() as chooser:
    page.click(button)
  chooser.value.set_files(path)
