"""Evaluators of a training: generated samples, and scores of held-out scenes.

A config names them as follows; `build` lists the fields.

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
  """Generates the same videos at each call, shows them and scores scenes.

  Attributes:
    every: training steps between two evaluations.
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
    """Stores the renderer and the requests.

    Args:
      name: name of the picture, and prefix of the metrics ("name/colour").
      every: see the attribute.
      renderer: generates the videos.
      requests: texts, noise and images of the videos.
      scenes: what the videos should show, in order; without scenes nothing is
        scored.
      shown: number of videos in the picture.
    """
    self.every = every
    self._name = name
    self._renderer, self._requests = renderer, requests
    self._scenes, self._shown = scenes, shown

  def __call__(self, variables: Any, step: int) -> Results:
    """Generates the videos and scores them.

    Args:
      variables: of the transformer, as for `rendering.Renderer.videos`.
      step: the training step; unused.

    Returns:
      The metrics "NAME/colour", "NAME/shape", "NAME/motion" and "NAME/all",
      shares from 0 to 1, if there are scenes; and the picture, uint8 `h w 3`,
      by the evaluator's name.
    """
    del step
    videos = self._renderer.videos(variables, self._requests)
    shares: dict[str, float] = {}
    if self._scenes:
      shares = scorer.score(map(scorer.read, videos), self._scenes)
    metrics = {f"{self._name}/{fact}": x for fact, x in shares.items()}
    return metrics, {self._name: contact_sheet.strips(videos[: self._shown])}


def build(config: Mapping[str, Any]) -> list[Evaluator]:
  """Builds the evaluators of a run's config.

  Texts and images are encoded here, once. Afterwards the autoencoder is the
  only model that stays in memory.

  Args:
    config: the config of a run of task "denoise". "evaluators" holds for each
      name
      what: "samples" or "semantic".
      prompts: the texts; for "semantic" the number of held-out scenes.
      images: a file for each prompt, for image to video with "samples" only;
        "semantic" draws its own.
      every: training steps between two evaluations.
      frames, height, width: size of the videos.
      solver, steps, shift, guidance: how to sample; `flow.Options` with the
        solver's own grid of noise levels.
      levels: noise levels of the steps, instead of the grid's; may be missing.
      seed: seed of the first video's noise with "samples"; with "semantic" it
        is added to the seed of the first scene. The next videos get the next
        seeds.
      batch_size: number of videos in a batch.
      autoencoder, text_encoder, tokenizer, image_encoder: paths that
        `convert.load` reads; the image encoder for image to video only.
      text_tokens: number of tokens of a prompt, as in training.

  Raises:
    errors.UserError: for a config that does not fit, or a model that cannot be
      read.
  """
  ranges.check(config)
  given = config.get("evaluators") or {}
  if given and config["task"] not in ("denoise", "distil"):
    raise errors.UserError(
      "evaluators sample from runs of task denoise or distil, found"
      f" {config['task']}"
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
  options = flow.Options(
    c["solver"], {}, c["shift"], _grid(c["solver"]), levels=c.get("levels")
  )
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
  first = c["seed"] + (asked[0].seed if asked else 0)
  seeds = range(first, first + len(text))
  requests = rendering.Requests(
    text,
    denoise.negative(config["negative"], *text.shape[1:]),
    np.asarray(denoiser.noise(seeds, renderer.shape)),
    keys=np.asarray(denoiser.keys(seeds)),
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
  """Returns the world's questions for "semantic", none for "samples"."""
  if c["what"] not in ("samples", "semantic"):
    raise errors.UserError(
      f"evaluators.{name}.what must be samples or semantic, found {c['what']!r}"
    )
  if c["what"] == "semantic" and c.get("images"):
    raise errors.UserError(
      f"evaluators.{name}.images are for samples: semantic draws its own"
    )
  return scorer.questions(c["prompts"]) if c["what"] == "semantic" else ()


def _grid(solver: str) -> str:
  """Returns the solver's grid; `sampler.plan` refuses unknown solvers later."""
  return _GRIDS.get(solver, "wan")


def _read(name, c, size) -> list[np.ndarray]:
  """Reads first frames from files and stretches them to the videos' size."""
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
  """Embeds texts with an encoder that is loaded for this call only.

  Args:
    encoder: path of the text encoder, which `convert.load` reads.
    tokenizer: directory of the tokenizer.
    prompts: the texts.
    tokens: number of tokens of each embedding.

  Returns:
    Embeddings (prompts, tokens, width) in float32, zero after the end of each
    text.

  Raises:
    errors.UserError: if the encoder or the tokenizer cannot be read.
  """
  ids, mask = tokenize.Tokenizer.from_directory(tokenizer)(prompts, tokens)
  module, variables = convert.load("umt5", encoder)
  run = jax.jit(functools.partial(conditions.text, module))
  rows = [
    run(variables, ids[i : i + 1], mask[i : i + 1]) for i in range(len(ids))
  ]
  return np.concatenate([np.asarray(row) for row in rows])


def see(encoder: str, images: Sequence[np.ndarray]) -> np.ndarray:
  """Computes CLIP features with an encoder that is loaded for this call only.

  Args:
    encoder: path of the image encoder, which `convert.load` reads.
    images: uint8 `h w 3`, of any size.

  Returns:
    Features (images, tokens, width).

  Raises:
    errors.UserError: if the path is empty or the encoder cannot be read.
  """
  if not encoder:
    raise errors.UserError("image to video needs an image_encoder, found none")
  module, variables = convert.load("clip_vision", encoder)
  run = jax.jit(functools.partial(conditions.image, module))
  rows = [
    run(variables, clip_images.preprocess(image, module.image_size)[None])
    for image in images
  ]
  return np.concatenate([np.asarray(row) for row in rows])
