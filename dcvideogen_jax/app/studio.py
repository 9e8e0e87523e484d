"""Makes the videos and reconstructions that the page asks for."""

import contextlib
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax import convert, errors, files
from dcvideogen_jax.app import estimates, forms, loads, previews, runs
from dcvideogen_jax.eval import reconstruction
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.plan import machine, sampling
from dcvideogen_jax.sample import model_names, results, settings

# What the phases of the pipeline are called on the page.
_STAGES = {
  "text": "embedding the text",
  "condition": "encoding the image",
  "compile": "compiling, if this size is new",
  "denoise": "denoising",
}


class Reconstructed(NamedTuple):
  """A reconstruction: its files, and its metrics.json."""

  directory: pathlib.Path
  metrics: dict[str, Any]


class Studio:
  """The models, and the folders of what is made.

  Attributes:
    served: how the page was started.
    models: hold the pipeline.
    output: folder of the videos.
    scratch: temporary folder, which goes with the process.
    turns: let one run after the other have the device.
    device: that of the models, as estimates see it.
    speeds: measured on the videos so far.
  """

  def __init__(
    self,
    served: forms.Served,
    models: loads.Models,
    scratch: pathlib.Path,
    budget: float | None = None,
  ):
    """Stores the arguments.

    Args:
      served: how the page was started.
      models: load what the page was started with.
      scratch: an empty folder that is removed when the page ends.
      budget: bytes for DC-AE-V; None is most of the free memory.
    """
    self.served, self.models = served, models
    self.output = pathlib.Path(served.output)
    self.scratch = scratch
    self.turns = runs.Turns()
    self.device = machine.device(jax.devices())
    self.speeds = estimates.Speeds()
    self._budget = budget
    self._clock = clock_lib.Clock()
    self._autoencoder: tuple[Any, Any] | None = None
    (scratch / "previews").mkdir()

  def size(self, c: Any) -> tuple[int, int]:
    """Returns the height and width that the form begins with."""
    size = sampling.size(c)
    return size.height, size.width

  def estimate(self, form: forms.Form) -> str:
    """Returns a line about what the form's videos take.

    Raises:
      errors.UserError: for a form that does not fit.
    """
    c = forms.config(self.served, form)
    videos = len(str(form.seeds).split(","))
    parts = self._parts()
    return estimates.told(parts, c, videos, self.device, self.speeds)

  def _parts(self) -> Any:
    """Returns the parts of the model that is loaded.

    Raises:
      errors.UserError: while there is none.
    """
    pipeline = self.models.held
    if pipeline is None:
      raise errors.UserError(
        "There is no model at the moment: wait, or make a video."
      )
    return pipeline.parts

  def make(
    self, form: forms.Form, image: np.ndarray | None
  ) -> Callable[[runs.Run], list[pathlib.Path]]:
    """Checks a form; returns the work that makes its videos.

    The work returns the paths of the videos without suffix. What it tells the
    run is `Stage`, `Progress` and `Shown`.

    Args:
      form: the fields of the page.
      image: first frame, uint8 (h, w, 3), or None.

    Raises:
      errors.UserError: for a form that does not fit.
    """
    c = forms.config(self.served, form)
    requests = forms.requests(form, c.task)

    def work(run: runs.Run) -> list[pathlib.Path]:
      self._clock.restart("load")
      pipeline = self.models.get(
        c.task, c.few is not None, lambda text: run.tell(runs.Stage(text))
      )
      return [
        self._one(run, pipeline, c, request, form, image)
        for request in requests
      ]

    return work

  def _one(self, run, pipeline, c, request, form, image) -> pathlib.Path:
    """Makes and writes a video, as `dcvideogen sample` does."""
    clock = self._clock

    def phase(name):
      if name in _STAGES:
        run.tell(runs.Stage(_STAGES[name]))
      return clock.phase(name)

    def on_step(i, latents):
      del latents
      run.tell(runs.Progress("step", i + 1, c.steps))

    options = settings.of_request(pipeline, c, request)
    result = pipeline.generate(
      request.prompt,
      size_rule=c.size_rule,
      condition_tail=c.condition_tail,
      memory_budget=self._budget,
      phase=phase,
      on_step=on_step,
      **options | {"image": image},
    )
    files.make_directory(self.output)
    path = self.output / request.name(next_index(self.output))
    alone = form._replace(seeds=str(request.seed))
    with self._preview() as directory:
      growing = previews.GrowingVideo(directory)

      def on_chunk(chunk):
        shown = growing.add(chunk[0])
        url = f"preview/{directory.name}/{shown.name}"
        run.tell(runs.Shown(url, growing.frames, result.size.frames))

      results.write(
        path,
        request,
        result.watched(on_chunk),
        clock,
        settings={
          "model": pipeline.parts.files,
          "few": c.few and forms.few(self.served, c.task).told(),
          "image": form.image or None,
          "command": forms.command(self.served, alone),
        },
      )
    self.speeds.measure(
      estimates.of(pipeline.parts, c), c.steps, clock.report()
    )
    clock.restart("load")
    return path

  @contextlib.contextmanager
  def _preview(self) -> Iterator[pathlib.Path]:
    """Yields a folder that the page may show; removes it."""
    directory = self.scratch / "previews" / secrets.token_hex(8)
    directory.mkdir()
    try:
      yield directory
    finally:
      shutil.rmtree(directory, ignore_errors=True)

  def reconstruct(
    self,
    path: pathlib.Path,
    name: str,
    max_frames: Any = None,
    height: Any = None,
  ) -> Callable[[runs.Run], Reconstructed]:
    """Checks a video or image; returns the work that reconstructs it.

    Args:
      path: the file.
      name: what it is called in titles and names.
      max_frames, height: as for `dcvideogen reconstruct`; None is all frames,
        and their own height.

    Raises:
      errors.UserError: for a file or numbers that do not fit.
    """
    for what, n in (("max_frames", max_frames), ("height", height)):
      if n is not None and (n != int(n) or n < 1):
        raise errors.UserError(f"{what} must be at least 1, found {n:g}")
    max_frames, height = (n and int(n) for n in (max_frames, height))
    source = reconstruction.probe(str(path), max_frames, height)

    def work(run: runs.Run) -> Reconstructed:
      self._clock.restart("load")
      run.tell(runs.Stage("loading DC-AE-V, and compiling if this size is new"))
      module, variables = self._dc_ae_v()
      checked = reconstruction.checked(source, module, "pad")
      target = self.output / "reconstructions" / _free_name(name)
      files.make_directory(target.parent)
      with files.atomic_directory(target) as new:
        metrics = reconstruction.write(
          new,
          module,
          variables,
          checked,
          title=name,
          settings={
            "input": name,
            "command": forms.reconstruct_command(
              self.autoencoder(),
              name,
              {"max_frames": max_frames, "height": height},
            ),
          },
          clock=self._clock,
          budget=self._budget,
          on_frames=lambda n: run.tell(
            runs.Progress("frame", n, checked.frames)
          ),
        )
      return Reconstructed(target, metrics)

    return work

  def autoencoder(self) -> str:
    """Returns the model as `dcvideogen reconstruct` takes it.

    Raises:
      errors.UserError: if the model has Wan's autoencoder.
    """
    parts = self._parts()
    if not isinstance(parts.space, spaces.DCAEVLatents):
      raise errors.UserError(
        "This model has Wan's own autoencoder: reconstructions are made with"
        " DC-AE-V."
      )
    path = pathlib.Path(parts.files["dc_ae_v"])
    shipped = model_names.weights("tiny")
    return "tiny" if path.resolve() == shipped.resolve() else str(path)

  def _dc_ae_v(self) -> tuple[Any, Any]:
    if self._autoencoder is None:
      path = model_names.weights(self.autoencoder())
      self._autoencoder = convert.load("dc_ae_v", path)
    return self._autoencoder


def next_index(directory: pathlib.Path) -> int:
  """Returns the number after the largest with which a file's name begins."""
  found = (re.match(r"(\d{5})_", path.name) for path in directory.iterdir())
  return max((int(match[1]) + 1 for match in found if match), default=0)


def _free_name(name: str) -> str:
  stem = re.sub(r"[^\w.-]+", "-", pathlib.Path(name).stem).strip("-.")[:40]
  return f"{stem or 'video'}-{secrets.token_hex(3)}"


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
  """Yields a temporary folder for uploads and previews; removes it."""
  with tempfile.TemporaryDirectory(prefix="dcvideogen_app_") as directory:
    yield pathlib.Path(directory)
