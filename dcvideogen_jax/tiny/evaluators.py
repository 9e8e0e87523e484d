"""Evaluators of a training: samples to look at, and a score of what they show.

"evaluators": {
  "semantic": {"what": "semantic", "prompts": 64, "every": 500, ...},
  "samples": {"what": "samples", "prompts": ("a cat",), ...},
}
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image

from dcvideogen_jax import convert, errors
from dcvideogen_jax.adapt import phases
from dcvideogen_jax.data import clip_images, stills, tokenize
from dcvideogen_jax.diffusion import flow, sampler
from dcvideogen_jax.eval import contact_sheet
from dcvideogen_jax.latents import conditions, denoiser, spaces
from dcvideogen_jax.tiny import scorer, world
from dcvideogen_jax.train import denoise, ranges, rendering, weights

Results = tuple[dict[str, float], dict[str, np.ndarray]]

_AUTOENCODERS = {"deep": "dc_ae_v", "base": "wan_vae"}
_GRIDS = {"unipc": "wan", "dpm++": "wan_dpm", "euler": "euler"}


class Evaluator:
  """Makes the same videos again and again, shows them, and scores scenes.

  Attributes:
    every: steps of the training between two evaluations.
  """

  def __init__(
    self,
    name: str,
    every: int,
    renderer: rendering.Renderer,
    requests: rendering.Requests,
    scenes: Sequence[world.Scene] = (),
    shown: int = 16,
  ):
    """Keeps what it needs.

    Args:
      name: of the picture and, before a stroke, of the metrics.
      every: see the attribute.
      renderer: makes videos.
      requests: which ones.
      scenes: what they shall show; none are scored without.
      shown: how many of them the picture has.
    """
    self.every = every
    self._name = name
    self._renderer, self._requests = renderer, requests
    self._scenes, self._shown = scenes, shown

  def __call__(self, variables: Any, step: int) -> Results:
    """The shares of right facts, NAME/all, NAME/colour..., and a picture."""
    del step
    videos = self._renderer.videos(variables, self._requests)
    shares: dict[str, float] = {}
    if self._scenes:
      shares = scorer.score(map(scorer.read, videos), self._scenes)
    metrics = {f"{self._name}/{fact}": x for fact, x in shares.items()}
    return metrics, {self._name: contact_sheet.strips(videos[: self._shown])}


def build(config: Mapping[str, Any]) -> list[Evaluator]:
  """The evaluators that a run's config asks for.

  Texts and images are encoded here, once; of the models only the autoencoder
  stays in memory.

  Args:
    config: of a run of task "denoise". "evaluators" has for each name
      what: "samples" or "semantic".
      prompts: texts; for "semantic" the number of held-out scenes.
      images: for image to video with "samples", a file for each prompt.
      every: steps between two evaluations.
      frames, height, width: of the videos.
      solver, steps, shift, guidance: of the sampling; `flow.Options` with the
        solver's own grid.
      seed: of the first video's noise; the following ones count up.
      batch_size: videos that are made at once.
      autoencoder, text_encoder, tokenizer, image_encoder: where they are, as
        `convert.load` reads them; the last for image to video only.
      text_tokens: of a prompt, as in training.

  Raises:
    errors.UserError: for a config that does not fit, or a model that cannot be
      read.
  """
  ranges.check(config)
  given = config.get("evaluators") or {}
  if given and config["task"] != "denoise":
    raise errors.UserError(
      f"evaluators sample from runs of task denoise, found {config['task']}"
    )
  return [_build(name, config, given[name]) for name in given]


def _build(name: str, config: Mapping[str, Any], c: Mapping[str, Any]):
  module = weights.build(config, phases.find(config["phase"]))
  asked = _questions(name, c)
  for part in ("autoencoder", "text_encoder", "tokenizer"):
    if not c[part]:
      raise errors.UserError(f"evaluators.{name} needs {part}, found none")
  kind = _AUTOENCODERS[config["space"]]
  space = spaces.SPACES[config["space"]](*convert.load(kind, c["autoencoder"]))
  options = flow.Options(c["solver"], {}, c["shift"], _grid(c["solver"]))
  settings = rendering.Settings(
    sampler.plan(options.schedule(c["steps"]), options.solver),
    c["guidance"],
    *(c[key] for key in ("frames", "height", "width", "batch_size")),
  )
  renderer = rendering.Renderer(module, space, settings)
  prompts = [q.prompt for q in asked] if asked else list(c["prompts"])
  if not prompts:
    raise errors.UserError(f"evaluators.{name}.prompts: there are none")
  text = embed(c["text_encoder"], c["tokenizer"], prompts, c["text_tokens"])
  if text.shape[-1] != module.text_width:
    raise errors.UserError(
      f"{c['text_encoder']} gives texts of width {text.shape[-1]}, the "
      f"transformer takes {module.text_width}"
    )
  first = asked[0].seed if asked else c["seed"]
  requests = rendering.Requests(
    text,
    denoise.negative(config["negative"], *text.shape[1:]),
    np.asarray(denoiser.noise(range(first, first + len(text)), renderer.shape)),
  )
  if module.image_width is not None:
    size = (c["height"], c["width"])
    images = [q.image(*size) for q in asked] or _read(name, c, size)
    requests = requests._replace(
      image=see(c["image_encoder"], images),
      condition=np.stack(
        [rendering.condition(space, image, c["frames"]) for image in images]
      ),
    )
  return Evaluator(
    name, c["every"], renderer, requests, [q.scene for q in asked]
  )


def _questions(name, c) -> Sequence[scorer.Question]:
  """What is asked of the world; nothing of other samples."""
  if c["what"] not in ("samples", "semantic"):
    raise errors.UserError(
      f"evaluators.{name}.what must be samples or semantic, found {c['what']!r}"
    )
  return scorer.questions(c["prompts"]) if c["what"] == "semantic" else ()


def _grid(solver: str) -> str:
  """A solver's own noise levels; an unknown one is refused with its plan."""
  return _GRIDS.get(solver, "wan")


def _read(name, c, size) -> list[np.ndarray]:
  """First frames from files, stretched to the size of the videos."""
  if len(c["images"]) != len(c["prompts"]):
    raise errors.UserError(
      f"evaluators.{name}.images: expected one for each of the "
      f"{len(c['prompts'])} prompts, found {len(c['images'])}"
    )
  images = [PIL.Image.fromarray(stills.read(x)) for x in c["images"]]
  return [np.asarray(image.resize(size[::-1])) for image in images]


def embed(
  encoder: str, tokenizer: str, prompts: Sequence[str], tokens: int
) -> np.ndarray:
  """Embeddings (n, tokens, e) of texts, zero after each one's end, float32.

  Args:
    encoder: the text encoder, as `convert.load` reads it; forgotten afterwards.
    tokenizer: its directory.
    prompts: n texts.
    tokens: of each.

  Raises:
    errors.UserError: if either cannot be read.
  """
  ids, mask = tokenize.Tokenizer.from_directory(tokenizer)(prompts, tokens)
  module, variables = convert.load("umt5", encoder)
  run = jax.jit(functools.partial(conditions.text, module))
  rows = [
    run(variables, ids[i : i + 1], mask[i : i + 1]) for i in range(len(ids))
  ]
  return np.concatenate([np.asarray(row) for row in rows])


def see(encoder: str, images: Sequence[np.ndarray]) -> np.ndarray:
  """CLIP features (n, m, f) of uint8 images; as `embed`."""
  if not encoder:
    raise errors.UserError("image to video needs an image_encoder, found none")
  module, variables = convert.load("clip_vision", encoder)
  run = jax.jit(functools.partial(conditions.image, module))
  rows = [
    run(variables, clip_images.preprocess(image, module.image_size)[None])
    for image in images
  ]
  return np.concatenate([np.asarray(row) for row in rows])
