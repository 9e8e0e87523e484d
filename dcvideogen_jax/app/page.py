"""The page of `dcvideogen app`, in Gradio: fields, buttons and what they call.

Gradio's own video and file components copy files into a cache and keep them, so
videos are shown in players of this page, from routes of `app.serve`.
"""

import collections
import time
from collections.abc import Iterator
from typing import Any

from dcvideogen_jax import errors
from dcvideogen_jax.app import estimates, forms, history, runs, snippets, tabs
from dcvideogen_jax.app import studio as studio_lib
from dcvideogen_jax.sample import model_names, sizes

_EXAMPLE = "a large yellow circle moves right over desert"
_HINT = "The video appears here, and grows while it is decoded."
_SIDE = "Original and reconstruction appear here."
# Of Gradio's events: no overlay of its own, and no entry in a public API.
_QUIET: dict[str, Any] = {
  "show_progress": "hidden",
  "api_visibility": "private",
}


class Page:
  """The callbacks of the page.

  Attributes:
    studio: makes what is asked for.
    tabs: the open tabs.
  """

  def __init__(self, studio: studio_lib.Studio):
    self.studio = studio
    self.tabs = tabs.Tabs(studio.scratch)

  def look(self, *fields: Any, request: Any) -> tuple[str, str]:
    """Returns the estimate and the command line for the fields."""
    form = self._form(fields, request)
    try:
      told = snippets.status(self.studio.estimate(form))
      return told, snippets.command(forms.command(self.studio.served, form))
    except errors.UserError as e:
      return snippets.problem(str(e)), ""

  def make(self, *fields: Any, request: Any) -> Iterator[tuple[str, str, str]]:
    """Yields the video, the status and the history while videos are made."""
    form, tab = self._form(fields, request), self.tabs.of(request)
    unchanged = self.history()
    try:
      run = self._start(tab, self.studio.make(form, tab.image))
    except errors.UserError as e:
      yield snippets.empty(_HINT), snippets.problem(str(e)), unchanged
      return
    shown = snippets.empty(_HINT)
    for event, status in self._follow(run):
      if isinstance(event, runs.Shown):
        note = f"{event.done} of {event.total} frames of the video"
        shown = snippets.video(event.url, note)
      if isinstance(event, runs.Ended):
        made = event.result or []
        shown = snippets.empty(_HINT)
        if made:
          shown = snippets.video(f"made/{made[-1].name}.mp4", form.prompt)
          where = ", ".join(f"{path}.mp4" for path in made)
          status = snippets.status(f"Done: {where}")
        unchanged = self.history()
      yield shown, status, unchanged

  def reconstruct(
    self, max_frames: Any, height: Any, request: Any
  ) -> Iterator[tuple[str, str, str, str]]:
    """Yields the videos, the error maps, the status and the command line."""
    tab, hint = self.tabs.of(request), snippets.empty(_SIDE)
    name = tab.video_name or "demo"
    try:
      path = tab.video or model_names.video("demo")
      work = self.studio.reconstruct(path, name, max_frames, height)
      line = forms.reconstruct_command(
        self.studio.autoencoder(),
        name,
        {"max_frames": max_frames, "height": height},
      )
      run = self._start(tab, work)
    except errors.UserError as e:
      yield hint, "", snippets.problem(tab.about_upload(e)), ""
      return
    for event, status in self._follow(run):
      if not isinstance(event, runs.Ended) or event.result is None:
        yield hint, "", status, snippets.command(line)
        continue
      directory, metrics = event.result
      base = f"reconstruction/{directory.name}"
      note = "original on the left, reconstruction on the right"
      moving = (directory / "side_by_side.mp4").exists()
      side = snippets.video if moving else snippets.picture
      suffix = "mp4" if moving else "png"
      yield (
        side(f"{base}/side_by_side.{suffix}", note),
        snippets.picture(f"{base}/contact_sheet.png", "error maps of frames"),
        snippets.metrics(metrics),
        snippets.command(line),
      )

  def settle(self, way: str, request: Any) -> tuple[Any, Any]:
    """Returns whether steps and guidance can be changed."""
    import gradio as gr

    del request
    free = gr.update(interactive=not forms.WAYS[way])
    return free, free

  def cancel(self, request: Any) -> None:
    """Cancels the run of the tab."""
    run = self.tabs.of(request).run
    if run is not None:
      run.cancel()

  def take_image(self, upload: Any, request: Any) -> tuple[str, Any, Any, str]:
    """Returns the thumbnail, the height and width of the video, and a status.

    The video gets the shape of the image, and as many pixels as the config has.
    """
    import gradio as gr

    tab = self.tabs.of(request)
    try:
      tab.take_image(upload)
    except errors.UserError as e:
      tab.drop_image()
      return "", gr.skip(), gr.skip(), snippets.problem(str(e))
    assert tab.image is not None
    c = forms.base(self.studio.served)
    height, width = sizes.of_image(*tab.image.shape[:2], c.area, 2)
    shown = snippets.thumbnail(tab.image, tab.image_name)
    return shown, height, width, snippets.status("")

  def drop_image(self, request: Any) -> str:
    """Forgets the image; returns the empty thumbnail."""
    self.tabs.of(request).drop_image()
    return ""

  def take_video(self, upload: Any, request: Any) -> str:
    """Takes the video to reconstruct; returns its name."""
    tab = self.tabs.of(request)
    try:
      tab.take_video(upload)
    except errors.UserError as e:
      return snippets.problem(str(e))
    return snippets.status(f"Input: {tab.video_name}")

  def drop_video(self, request: Any) -> str:
    """Removes the upload; the clip that ships is the input again."""
    self.tabs.of(request).drop_video()
    return snippets.status("Input: demo, the clip that ships")

  def history(self) -> str:
    """Returns the videos that were made."""
    return snippets.cards(history.made(self.studio.output))

  def _form(self, fields: tuple[Any, ...], request: Any) -> forms.Form:
    image = self.tabs.of(request).image_name
    return forms.Form(*fields, image=image)

  def _start(self, tab: tabs.Tab, work: Any) -> runs.Run:
    if tab.run is not None:
      tab.run.cancel()
    tab.run = runs.Run(work, self.studio.turns)
    return tab.run

  def _follow(self, run: runs.Run) -> Iterator[tuple[Any, str]]:
    """Yields the events of a run, each with its status; cancels if left."""
    recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=20)
    try:
      for event in run.events():
        match event:
          case runs.Waiting(ahead):
            others = "another run" if ahead == 1 else f"{ahead} other runs"
            yield event, snippets.status(f"Waiting for {others}")
          case runs.Stage(text):
            recent.clear()
            yield event, snippets.status(f"{text[:1].upper()}{text[1:]} ...")
          case runs.Progress(what, done, total):
            recent.append((done, time.monotonic()))
            left = estimates.remaining(recent, total)
            text = f"{what.capitalize()} {done} of {total}"
            text += f", {left}" if left else ""
            yield event, snippets.status(text, done, total)
          case runs.Shown(_, done, total):
            text = f"Decoding: frame {done} of {total}"
            yield event, snippets.status(text, done, total)
          case runs.Ended(None, sentence):
            yield event, snippets.problem(sentence)
          case _:
            yield event, snippets.status("Done")
    finally:
      run.cancel()


def build(studio: studio_lib.Studio) -> Any:
  """Returns the page, a `gradio.Blocks`."""
  import gradio as gr

  page = Page(studio)
  with gr.Blocks(title="DC-VideoGen", analytics_enabled=False) as blocks:
    gr.HTML(snippets.heading(studio.served.config, str(studio.output)))
    with gr.Tab("Make a video"):
      _making(gr, page, blocks)
    with gr.Tab("Reconstruct"):
      _reconstructing(gr, page)
    blocks.unload(_called(gr, page.tabs.close))
  return blocks


def _making(gr: Any, page: Page, blocks: Any) -> None:
  """Adds the fields and buttons that make videos, and what was made."""
  c = forms.base(page.studio.served)
  height, width = page.studio.size(c)
  with gr.Row():
    with gr.Column(scale=2, min_width=320):
      prompt = gr.Textbox(_EXAMPLE, label="Prompt", lines=2, max_lines=6)
      with gr.Row():
        choose = gr.UploadButton(
          "First frame ...",
          file_types=["image"],
          size="sm",
          elem_id="image",
        )
        drop = gr.Button("No image", size="sm", elem_id="no_image")
      thumbnail = gr.HTML(elem_classes="dc", elem_id="thumbnail")
      with gr.Row():
        numbers = [
          _number(gr, "Frames", c.frames),
          _number(gr, "Height", height),
          _number(gr, "Width", width),
        ]
        seeds = gr.Textbox(
          "0", label="Seeds", placeholder="such as 0, 1", min_width=80
        )
      with gr.Row():
        steps = _number(gr, "Steps", c.steps)
        guidance = gr.Number(c.guidance_scale, label="Guidance", min_width=80)
        way = gr.Radio(
          forms.ways(page.studio.served),
          value="steps",
          label="Way",
          elem_id="way",
          scale=2,
        )
      with gr.Accordion("Negative prompt", open=False):
        negative = gr.Textbox(
          label="Empty: the model's own", lines=2, max_lines=4
        )
      estimate = gr.HTML(elem_classes="dc", elem_id="estimate")
      with gr.Row():
        start = gr.Button("Make", variant="primary", elem_id="make")
        stop = gr.Button("Cancel", elem_id="cancel")
    with gr.Column(scale=3, min_width=360):
      video = gr.HTML(snippets.empty(_HINT), elem_classes="dc", elem_id="video")
      status = gr.HTML(elem_classes="dc", elem_id="status")
      gr.HTML("<b>The same from the command line</b>")
      command = gr.HTML(elem_classes="dc", elem_id="command")
  gr.HTML("<h3>Made so far</h3>")
  history = gr.HTML(elem_classes="dc", elem_id="history")
  fields = [prompt, negative, *numbers, steps, guidance, seeds, way]
  looked = {"fn": _called(gr, page.look), "inputs": fields} | _QUIET
  looked["outputs"] = [estimate, command]
  gr.on(
    [x.change for x in fields],
    **looked,
    trigger_mode="always_last",
    concurrency_limit=4,
  )
  settled = [steps, guidance]
  way.change(_called(gr, page.settle), way, settled, **_QUIET)
  image = choose.upload(
    _called(gr, page.take_image),
    choose,
    [thumbnail, numbers[1], numbers[2], status],
    preprocess=False,  # It would leave an empty file for each upload.
    **_QUIET,
  )
  gone = drop.click(_called(gr, page.drop_image), None, thumbnail, **_QUIET)
  for event in (image, gone):
    event.then(**looked)
  blocks.load(**looked)
  blocks.load(page.history, None, history, **_QUIET)
  start.click(
    _generated(gr, page.make),
    fields,
    [video, status, history],
    concurrency_limit=None,
    **_QUIET,
  ).then(**looked)
  stop.click(_called(gr, page.cancel), **_QUIET)


def _reconstructing(gr: Any, page: Page) -> None:
  """Adds what encodes and decodes a video."""
  with gr.Row():
    with gr.Column(scale=2, min_width=320):
      gr.Markdown(
        "Encodes and decodes a video or an image with DC-AE-V, and shows where"
        " the result differs."
      )
      with gr.Row():
        choose = gr.UploadButton(
          "Video or image ...",
          file_types=["video", "image"],
          size="sm",
          elem_id="upload",
        )
        drop = gr.Button("The clip that ships", size="sm")
      named = gr.HTML(
        snippets.status("Input: demo, the clip that ships"),
        elem_classes="dc",
        elem_id="input",
      )
      with gr.Row():
        frames = _number(gr, "Frames at most", 16)
        height = _number(gr, "Height, empty: its own", 128)
      with gr.Row():
        start = gr.Button(
          "Reconstruct", variant="primary", elem_id="reconstruct"
        )
        stop = gr.Button("Cancel")
      status = gr.HTML(elem_classes="dc", elem_id="figures")
      command = gr.HTML(elem_classes="dc")
    with gr.Column(scale=3, min_width=360):
      side = gr.HTML(snippets.empty(_SIDE), elem_classes="dc", elem_id="side")
      maps = gr.HTML(elem_classes="dc", elem_id="maps")
  choose.upload(
    _called(gr, page.take_video), choose, named, preprocess=False, **_QUIET
  )
  drop.click(_called(gr, page.drop_video), None, named, **_QUIET)
  start.click(
    _generated(gr, page.reconstruct),
    [frames, height],
    [side, maps, status, command],
    concurrency_limit=None,
    **_QUIET,
  )
  stop.click(_called(gr, page.cancel), **_QUIET)


def _number(gr: Any, label: str, value: Any) -> Any:
  return gr.Number(value, label=label, precision=0, min_width=80)


def _called(gr: Any, function: Any) -> Any:
  """Returns a function of the values of fields, to which Gradio adds `request`.

  Gradio gives its request to a parameter with that annotation.
  """

  def called(request, *fields):
    return function(*fields, request=request)

  called.__annotations__ = {"request": gr.Request}
  return called


def _generated(gr: Any, function: Any) -> Any:
  """Returns the same as `_called`, for a function that yields."""

  def generated(request, *fields):
    yield from function(*fields, request=request)

  generated.__annotations__ = {"request": gr.Request}
  return generated
