"""The parts of the page that are not Gradio's, as HTML."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from dcvideogen_jax.app import history
from dcvideogen_jax.eval import contact_sheet

# Fonts of the system: nothing is fetched.
FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")

CSS = """
.dc video, .dc img { max-width: 100%; display: block; border-radius: 6px; }
.dc .stage {
  min-height: 300px; display: flex; align-items: center;
  justify-content: center; background: var(--background-fill-secondary);
  border-radius: 8px; overflow: hidden;
}
.dc .stage video, .dc .stage img {
  width: 100%; max-height: 46vh; object-fit: contain;
}
.dc .hint { color: var(--body-text-color-subdued); padding: 1em; }
.dc .told { min-height: 1.5em; }
.dc progress { width: 100%; height: 10px; accent-color: #f97316; }
.dc small { display: block; }
input:disabled { opacity: 0.4; }
#thumbnail:not(:has(img)) { display: none; }
.dc .problem {
  border-left: 4px solid #b91c1c; padding: 6px 12px; background: #b91c1c18;
}
.dc pre {
  white-space: pre-wrap; word-break: break-word; font-size: 13px;
  padding: 8px 10px; margin: 0; border-radius: 6px;
  background: var(--background-fill-secondary); user-select: all;
}
.dc .cards {
  display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(210px, 1fr));
}
.dc .card { font-size: 13px; min-width: 0; }
.dc .card video { width: 100%; aspect-ratio: 1; object-fit: contain;
  background: var(--background-fill-secondary); }
.dc .card p { margin: 4px 0; overflow-wrap: anywhere; }
.dc summary { cursor: pointer; }
"""


def heading(config: str, output: str) -> str:
  """Returns the title, the model and where videos go."""
  return (
    f"<h2>DC-VideoGen: {_text(config)}</h2>"
    f"<small>Videos are kept in {_text(output)}</small>"
  )


def video(url: str, note: str = "", poster: str = "") -> str:
  """Returns a player that loops; `note` is for people who cannot see it."""
  shown = f' poster="{_text(poster)}"' if poster else ""
  return (
    f'<div class="stage"><video src="{_text(url)}"{shown} controls loop'
    f' autoplay muted playsinline aria-label="{_text(note)}"></video></div>'
  )


def picture(url: str, note: str) -> str:
  """Returns an image, which `note` describes; a click shows its full size."""
  shown = f'<img src="{_text(url)}" alt="{_text(note)}">'
  link = f'<a href="{_text(url)}" target="_blank">{shown}</a>'
  return f'<div class="stage">{link}</div>'


def empty(hint: str) -> str:
  """Returns the place of a video before there is one."""
  return f'<div class="stage"><span class="hint">{_text(hint)}</span></div>'


def status(text: str, done: int = 0, total: int = 0) -> str:
  """Returns a line about progress, with a bar if there is a total."""
  bar = f'<progress value="{done}" max="{total}"></progress>' if total else ""
  return f'<div class="told" role="status">{_text(text)}{bar}</div>'


def problem(sentence: str) -> str:
  """Returns a sentence about what went wrong."""
  shown = sentence[:1].upper() + sentence[1:]
  end = "" if shown.endswith((".", "?", "!")) else "."
  return f'<div class="told problem" role="alert">{_text(shown)}{end}</div>'


def command(line: str) -> str:
  """Returns a command line, which one click selects."""
  return f"<pre>{_text(line)}</pre>" if line else ""


def thumbnail(image: np.ndarray, name: str) -> str:
  """Returns a small picture within the page, so that no file is needed."""
  small = PIL.Image.fromarray(image)
  small.thumbnail((320, 200))
  data = io.BytesIO()
  small.save(data, "JPEG", quality=85)
  source = base64.b64encode(data.getvalue()).decode()
  height, width = image.shape[:2]
  return (
    f'<img src="data:image/jpeg;base64,{source}" alt="first frame">'
    f"<small>{_text(name)}, {width} x {height}</small>"
  )


def cards(videos: Sequence[history.Made]) -> str:
  """Returns the videos that were made, each with its command."""
  if not videos:
    return '<p class="hint">Nothing has been made yet.</p>'
  return f'<div class="cards">{"".join(map(_card, videos))}</div>'


def _card(made: history.Made) -> str:
  again = ""
  if made.command:
    again = f"<details><summary>command</summary>{command(made.command)}"
    again += "</details>"
  return (
    f'<div class="card"><video src="made/{_text(made.name)}.mp4#t=0.01"'
    f' controls loop muted playsinline preload="metadata"></video>'
    f"<p>{_text(made.prompt)}</p>"
    f"<p><small>{_text(made.size)}, {_text(made.steps)} steps, seed"
    f" {_text(made.seed)}, {_text(made.seconds)} s</small></p>{again}</div>"
  )


def metrics(found: dict[str, Any]) -> str:
  """Returns the figures of a reconstruction in a line."""
  psnr, ssim = found["psnr"]["mean"], found["ssim"]["mean"]
  exact = "exact" if psnr is None else f"PSNR {psnr:.2f} dB"
  ratio, count = found["compression"]["ratio"], found["frames"]
  frames = "1 frame" if count == 1 else f"{count} frames"
  return status(
    f"{exact}, SSIM {ssim:.4f}, {frames},"
    f" {ratio:.0f} times fewer numbers, {found['seconds']['total']:.1f} s."
    f" {contact_sheet.COMPARISON[2].capitalize()}."
  )


def _text(value: str) -> str:
  return html.escape(value, quote=True)
