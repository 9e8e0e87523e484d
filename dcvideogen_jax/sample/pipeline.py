"""Generates a video from a prompt and, for image to video, an image.

    pipeline = DCVideoGen.from_pretrained("dc-ai/DC-Gen-Wan2.1-T2V-14B@main")
    video = pipeline.generate("a cat walks", height=720, width=1280, frames=80)
    video.save("cat.mp4")

Follows DC-Gen `dc_videogen/pipeline_dc_videogen_wan_{t2v,i2v}.py` (commit
cae2205) and, for Wan's own models, diffusers' `WanPipeline` (commit 58eb52c).
Deviations, with the option for the official behaviour: sizes are not rounded
down (`size_rule`); the last frame of a condition is repeated if its frames do
not fill a chunk of DC-AE-V (`condition_tail`). Without an option: all models
stay on the device, conditions are encoded in float32, and noise comes from
`jax.random`, which gives the same on every device up to rounding.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dcvideogen_jax import errors, memory
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.diffusion import flow, sampler
from dcvideogen_jax.latents import denoiser
from dcvideogen_jax.sample import (
  arguments,
  conditioning,
  denoise,
  embedding,
  generation,
  loading,
  placement,
  sizes,
  streams,
)
from dcvideogen_jax.sample import options as options_lib


class DCVideoGen:
  """Text or image to video, with all models resident on the device.

  Attributes:
    parts: the models.
    embedder: embeds texts, and keeps their embeddings.
    task: "t2v" or "i2v".
    layout: of the models on several devices; None is one device.
  """

  def __init__(
    self,
    parts: loading.Parts,
    layout: placement.Layout | None = None,
    embedder: embedding.Embedder | None = None,
    conditions: conditioning.Conditions | None = None,
  ):
    """Builds a pipeline from loaded parts.

    Args:
      parts: the models; `texts` may be None if only embeddings are given.
      layout: the layout with which the parts were loaded.
      embedder: has embedded texts before; None makes one of the parts.
      conditions: has encoded images before, as `encode_images` returns it.

    Raises:
      errors.UserError: if the transformer and the autoencoder do not fit.
    """
    loading.check_channels(parts.transformer.module, parts.space)
    self.parts = parts
    self.task = parts.task
    self.layout = layout
    self.embedder = embedder or embedding.Embedder(parts.texts, layout)
    self._conditions = conditions or conditioning.Conditions()

  @classmethod
  def from_pretrained(
    cls,
    source: str | os.PathLike[str],
    *,
    embed: Sequence[str] | None = None,
    encode: Iterable[Mapping[str, Any]] | None = None,
    **options: Any,
  ) -> "DCVideoGen":
    """Loads a published model; arguments and errors as for `loading.load`.

    Args:
      source: as for `loading.load`.
      embed: texts to embed, beside Wan's negative prompt: the text encoder
        comes first, and goes before the other models come. Other texts are
        then refused.
      encode: for image to video, videos as for `encode_images`: CLIP and the
        encoder of DC-AE-V come first, and go in the same way.
      **options: of `loading.load`.
    """
    layout, embedder, conditions = options.get("layout"), None, None
    shared = {k: x for k, x in options.items() if k != "change"}
    if embed is not None:
      embedder = embedding.Embedder(loading.texts(source, **shared), layout)
      negative = embedding.negative_prompt(options.get("task", "t2v"))
      for text in (*embed, negative):
        embedder(text)
      embedder.free()
      options["text_encoder"] = None
    if encode is not None:
      shared.pop("text_encoder", None)
      encoders = cls(loading.image_encoders(source, **shared), layout)
      conditions = encoders.encode_images(encode)
      loading.free(encoders.parts)
      options["image_encoders"] = False
    return cls(loading.load(source, **options), layout, embedder, conditions)

  def free_text_encoder(self) -> None:
    """Frees the text encoder's memory; embeddings of texts seen so far stay."""
    self.embedder.free()
    self.parts = self.parts._replace(texts=None)

  def generate(
    self, prompt: arguments.Prompt, **options: Any
  ) -> generation.Generation:
    """Generates latents; the result decodes them on demand.

    Args:
      prompt: one text; several texts, which are sampled together; or embeddings
        from `embed`.
      **options: of `options.VideoOptions`, such as `height` and `steps`.

    Raises:
      errors.UserError: for sizes, prompts, images or noise that do not fit.
    """
    asked = options_lib.VideoOptions(**options)
    prompts, b = arguments.prompts(prompt)
    arguments.images(self.task, asked.image, asked.last_image, asked.condition)
    images = self._images(asked)
    size = images.size
    shape = self.latent_shape(size)
    module = self.parts.transformer.module
    condition = arguments.condition(
      asked.condition, shape[:3], module.in_channels - shape[-1]
    )
    noise, seeds = arguments.noise(asked.noise, asked.seed, (b, *shape))
    how = denoise.prepare(self, asked, module, noise.shape)
    with asked.phase("text"):
      text = self.embed(prompts, b)
      negative = self.embed(how.negative, b) if how.guided else None
    if self.task == "i2v" and not condition:
      with asked.phase("condition"):
        condition = self._conditions(self, images, asked.memory_budget)
    shared = {k: jnp.repeat(x, b, axis=0) for k, x in condition.items()}
    latents = denoise.run(
      self,
      self.parts.transformer,
      how,
      self.put(noise),
      {"text": text, **shared},
      None if negative is None else {"text": negative, **shared},
      phase=asked.phase,
      on_step=asked.on_step,
      one_program=asked.one_program,
      keys=self.put(denoiser.keys(arguments.seeds(asked.seed, b))),
    )
    settings = self.settings(size, shape, how, seeds) | {
      "prompts": arguments.shown(prompts),
      "text_tokens": text.shape[1],
      "size_rule": asked.size_rule,
      "condition_tail": images.tail,
      "one_program": asked.one_program,
    }
    decode = functools.partial(
      self._decode, size, asked.memory_budget, asked.phase
    )
    return generation.Generation(latents, size, settings, decode)

  def encode_images(
    self, videos: Iterable[Mapping[str, Any]]
  ) -> conditioning.Conditions:
    """Encodes the images of videos for `generate`, and keeps them on the host.

    Args:
      videos: for each video the options of `generate` that say its images, its
        size and the memory budget; others have no effect.

    Returns:
      The conditions, which another pipeline may take.

    Raises:
      errors.UserError: as `generate`.
    """
    for options in videos:
      asked = options_lib.VideoOptions(**options)
      arguments.images(self.task, asked.image, asked.last_image, None)
      self._conditions.keep(self, self._images(asked), asked.memory_budget)
    return self._conditions

  def generate_stream(
    self, prompt: streams.Prompts, **options: Any
  ) -> streams.Stream:
    """Generates a video of any length, chunk by chunk.

        for frames in model.generate_stream("a cat walks", frames=1600):
          ...  # uint8 (b, t, h, w, 3)

    Arguments and errors are those of `streams.start`.
    """
    return streams.start(self, prompt, **options)

  def _images(self, asked: options_lib.VideoOptions) -> conditioning.Images:
    """Checks images and size; returns them."""
    first = arguments.image(asked.image, "image")
    size = self.size(
      asked.frames,
      asked.height,
      asked.width,
      asked.area,
      first,
      asked.size_rule,
    )
    return conditioning.Images(
      first,
      arguments.image(asked.last_image, "last_image"),
      size,
      arguments.condition_tail(asked.condition_tail, asked.size_rule),
    )

  def settings(
    self,
    size: sizes.Size,
    shape: Sequence[int],
    how: denoise.Denoising,
    seeds: Sequence[int] | None,
  ) -> dict[str, Any]:
    """Returns the settings of a run, ready for JSON.

    Args:
      size, shape: of the video; of one sample's latents.
      how, seeds: of the denoising; seeds are None if the noise was given.
    """
    return {
      "task": self.task,
      "negative_prompt": arguments.shown(how.negative) if how.guided else None,
      **size._asdict(),
      "latents": list(shape),
      "steps": how.plan.steps,
      "guidance_scale": how.scale,
      "batched": how.batched,
      **how.told(),
      "seeds": seeds,
      "dtype": jnp.dtype(self.parts.dtype).name,
      "weights": self.parts.transformer.module.weights,
      "mesh": self.layout and dict(self.layout.mesh.shape),
      "files": dict(self.parts.files),
    }

  def plan(
    self, options: flow.Options | None, shift: float | None, steps: int | None
  ) -> tuple[flow.Options, sampler.SamplingPlan]:
    """Plans the solver's steps, with its options; errors as for `generate`.

    Args:
      options, shift: as in `options.Options`; None is the checkpoint's.
      steps: number of the solver's steps; None is as in `options.Options`.
    """
    return denoise.plan(options or self.parts.options, shift, steps)

  def size(
    self,
    frames: int,
    height: int | None,
    width: int | None,
    area: int = sizes.AREA,
    image: arguments.Image | None = None,
    rule: str = "exact",
  ) -> sizes.Size:
    """Returns the size of the video; errors as for `generate`.

    Args:
      frames, height, width, area: as in `options.VideoOptions`.
      image, rule: the first frame, or None; the `size_rule`.
    """
    shape = None if image is None else image.shape[:2]
    size = sizes.asked(frames, height, width, area, shape, self._multiple, rule)
    if rule == "exact":
      return size
    space = self.parts.space
    return sizes.official(size, self._multiple, space.temporal, space.first)

  @property
  def _multiple(self) -> int:
    """Side of a token, in pixels."""
    return self.parts.space.spatial * self.parts.transformer.module.patch[1]

  def latent_shape(self, size: sizes.Size) -> tuple[int, int, int, int]:
    """Returns the shape `t h w c` of latents, rounded up to whole tokens."""
    space, patch = self.parts.space, self.parts.transformer.module.patch
    t = space.latent_frames(size.frames)
    h, w = (
      -(-n // (space.spatial * p)) * p
      for n, p in zip(size[1:], patch[1:], strict=True)
    )
    return -(-t // patch[0]) * patch[0], h, w, space.channels

  def embed(
    self, prompt: arguments.Prompt, b: int = 1
  ) -> Float[Array, "n s d"]:
    """Returns text embeddings, zero after a text's end; caches those of texts.

    Args:
      prompt: texts; or embeddings, which are only checked.
      b: number of embeddings to return; a single one is repeated.

    Raises:
      errors.UserError: if the prompts do not fit, or if a text is new and the
        text encoder was freed.
    """
    prompts, count = arguments.prompts(prompt)
    if count not in (1, b):
      wanted = f"1 or {b} prompts" if b > 1 else "1 prompt"
      raise errors.UserError(f"expected {wanted}, found {count}")
    width = self.parts.transformer.module.text_width
    if isinstance(prompts, list):
      prompts = np.concatenate([self.embedder(x) for x in prompts])
    if prompts.shape[-1] != width:
      raise errors.UserError(
        f"expected text embeddings (b, s, {width}), found {prompts.shape}"
      )
    return jnp.repeat(self.put(prompts), b // count, axis=0)

  def condition(
    self,
    image: arguments.Image,
    last_image: arguments.Image | None,
    size: sizes.Size,
    memory_budget: float | None = None,
    tail: str = "pad",
  ) -> dict[str, Array]:
    """Encodes the images for an image-to-video model.

    Args:
      image: first frame.
      last_image: last frame, or None.
      size: of the video.
      memory_budget: as for `generate`.
      tail: "pad" or "official", see `options.VideoOptions.condition_tail`.

    Returns:
      "image", the CLIP features (1, tokens, width), of both images only if the
      model tells them apart; and "extra", `1 t h w c`, the mask (4 channels, 1
      on conditioned frames) followed by the encoded images.

    Raises:
      errors.UserError: if the video has too few frames for two images.
    """
    images = conditioning.Images(image, last_image, size, tail)
    return conditioning.encode(self, images, memory_budget)

  def negative_prompt(self) -> str:
    """Returns Wan's own negative prompt for the task."""
    return embedding.negative_prompt(self.task)

  def _decode(self, size, memory_budget, phase, latents):
    budget = self.budget(memory_budget)
    with placement.in_force(self.layout):
      chunks = self.parts.space.decode(latents, size, self.parts.dtype, budget)
    yield from self.each(chunks, phase, "decode")

  def each(
    self,
    items: Iterator[Any],
    phase: Callable[..., contextlib.AbstractContextManager[Any]],
    name: str,
  ) -> Iterator[Any]:
    """Yields items, each computed within a phase and on the layout's devices.

    Args:
      items: computes the next item when asked.
      phase, name: as in `options.Options`; the name of the phase.
    """
    while True:
      with phase(name), placement.in_force(self.layout):
        item = next(items, None)
      if item is None:
        return
      yield item

  def budget(self, budget: float | None) -> float:
    """Returns bytes for encoding and decoding; None is most of free memory."""
    return memory.SHARE * memory.free_on_all() if budget is None else budget

  def put(self, x: Any) -> Array:
    """Puts an array on the device, or on all devices of the layout."""
    return jnp.asarray(x) if self.layout is None else self.layout.put(x)
