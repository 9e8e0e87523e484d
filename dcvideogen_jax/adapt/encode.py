"""What a clip is to the diffusion models: latents, conditions, text, image.

Pure functions, for training from raw video with the frozen encoders in the
step, and the same clip after clip in bounded memory, for encoding beforehand.
Both autoencoders compute in float32: the official code encodes with DC-AE-V in
bfloat16, which visibly hurts image to video.

A clip of 4 (k + 1) frames has k + 1 latent frames in either space: DC-AE-V
takes all frames, Wan's autoencoder the first 1 + 4k. A video is uint8, meaning
0..255, or float, meaning [-1, 1].
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dcvideogen_jax import errors, levels
from dcvideogen_jax.models import (
  bands,
  clip_vision,
  dc_ae_v,
  streaming,
  umt5,
  wan_vae,
)

Variables = Mapping[str, Any]
Video = Shaped[Array, "b t h w 3"]
Image = Shaped[Array, "b h w 3"]
Latents = Float[Array, "b t h w c"]

_PIECE = 8  # frames that are streamed at a time


def base_latents(
  module: wan_vae.WanVAE, variables: Variables, video: Video
) -> Latents:
  """Wan's latents of the first 1 + 4k frames: the mean, normalised, float32.

  The official training draws from the posterior instead; both public pipelines
  encode images by the mean.
  """
  module = module.clone(dtype=jnp.float32)
  video = levels.to_float(video[:, : base_frames(module, video.shape[1])])
  return module.normalise(module.apply(variables, video, method="encode").mean)


def deep_latents(
  module: dc_ae_v.DCAEV, variables: Variables, video: Video
) -> Latents:
  """DC-AE-V's latents times its scale, float32.

  Frames that do not fill a chunk are encoded with the last one repeated.

  Raises:
    errors.UserError: if the frames are no multiple of `temporal_factor`, or
      height and width none of `spatial_factor`.
  """
  module = module.clone(dtype=jnp.float32)
  frames = deep_frames(module, video.shape[1])
  if any(size % module.spatial_factor for size in video.shape[2:4]):
    raise errors.UserError(
      f"clips are multiples of {module.spatial_factor} pixels, found "
      f"{video.shape[2]}x{video.shape[3]}"
    )
  latents = module.apply(variables, levels.to_float(video), method="encode")
  return latents[:, : frames // module.temporal_factor] * module.latent_scale


def base_condition(
  module: wan_vae.WanVAE, variables: Variables, image: Image, frames: int
) -> Latents:
  """Wan's latents of the first frame and then grey.

  Args:
    module: the autoencoder.
    variables: `{"params": ...}`.
    image: the first frame of each clip.
    frames: of the clips; 1 + 4k of them are encoded.
  """
  video = jnp.concatenate([*condition_video(image, frames, 1)], axis=1)
  return base_latents(module, variables, video)


def deep_condition(
  module: dc_ae_v.DCAEV, variables: Variables, image: Image, frames: int
) -> Latents:
  """DC-AE-V's latents of the first frame, once per frame of a latent, and grey.

  Arguments and errors as of `base_condition` and `deep_latents`.
  """
  repeats = module.temporal_factor
  video = jnp.concatenate([*condition_video(image, frames, repeats)], axis=1)
  return deep_latents(module, variables, video)


def text(
  module: umt5.UMT5Encoder,
  variables: Variables,
  ids: Int[Array, "b s"],
  mask: Int[Array, "b s"],
) -> Float[Array, "b s e"]:
  """Embeddings of texts, zero after each text's end, float32."""
  hidden = module.apply(variables, ids, mask)
  return umt5.zero_padding(hidden, mask).astype(jnp.float32)


def image(
  module: clip_vision.CLIPVision,
  variables: Variables,
  pixels: Float[Array, "b h w 3"],
) -> Float[Array, "b m e"]:
  """CLIP's features of what `data.clip_images` prepared, float32."""
  return module.clone(dtype=jnp.float32).apply(variables, pixels)


def clips(
  modules: Mapping[str, Any],
  variables: Mapping[str, Variables],
  batch: Mapping[str, Array],
) -> dict[str, Array]:
  """Raw clips as `data.latents` would give them.

  Args:
    modules: the autoencoders "base" and "deep", "text" and "image", of which
      any may be missing; with "image", conditions are encoded too.
    variables: of each.
    batch: of `data.captioned`: "video", "ids", "mask" and, for "image",
      "pixels".

  Returns:
    "base", "deep", "base_condition", "deep_condition", "text" and "image".
  """
  video = batch["video"]
  first, frames = video[:, 0], video.shape[1]
  found = {}
  for space, latents, condition in (
    ("base", base_latents, base_condition),
    ("deep", deep_latents, deep_condition),
  ):
    if space in modules:
      model = modules[space], variables[space]
      found[space] = latents(*model, video)
      if "image" in modules:
        found[f"{space}_condition"] = condition(*model, first, frames)
  if "text" in modules:
    model = modules["text"], variables["text"]
    found["text"] = text(*model, batch["ids"], batch["mask"])
  if "image" in modules:
    model = modules["image"], variables["image"]
    found["image"] = image(*model, batch["pixels"])
  return found


# --- clip after clip, in bounded memory --------------------------------------


def stream_base(
  module: wan_vae.WanVAE, variables: Variables, video: Iterable[Any]
) -> Latents:
  """As `base_latents`, of a video in pieces, latent frame by latent frame."""
  module = module.clone(dtype=jnp.float32)
  means = [
    posterior.mean
    for posterior in wan_vae.stream_encode(
      module, variables, video, tail="official"
    )
  ]
  return module.normalise(jnp.concatenate(means, axis=1))


def stream_deep(
  module: dc_ae_v.DCAEV,
  variables: Variables,
  video: Iterable[Any],
  frames: int,
  plan: bands.BandPlan,
  tail: str = "pad",
) -> Latents:
  """As `deep_latents`, of a video in pieces, chunk by chunk and in bands.

  Args:
    module: the autoencoder, chunk-causal or causal.
    variables: `{"params": ...}`.
    video: pieces `b t h w 3`.
    frames: of the video.
    plan: of `bands.plan`, for the module in float32.
    tail: what becomes of frames that do not fill a chunk, as of
      `streaming.encode`.

  Raises:
    errors.UserError: as `deep_latents`.
  """
  module = module.clone(dtype=jnp.float32)
  frames = deep_frames(module, frames) // module.temporal_factor
  chunks = streaming.encode(module, variables, video, plan=plan, tail=tail)
  latents = jnp.concatenate(list(chunks), axis=1)[:, :frames]
  return latents * module.latent_scale


def pieces(video: Video) -> Iterator[Video]:
  """A video some frames at a time."""
  for start in range(0, video.shape[1], _PIECE):
    yield video[:, start : start + _PIECE]


def condition_video(
  image: Image, frames: int, repeats: int, last: Image | None = None
) -> Iterator[Float[Array, "b t h w 3"]]:
  """Pieces of a video: an image so many times, then mid-grey; float32.

  A last image, if there is one, ends the video as many times.
  """
  first = levels.to_float(image)[:, None]
  yield first.repeat(repeats, 1)
  end = frames if last is None else frames - repeats
  for start in range(repeats, end, _PIECE):
    count = min(_PIECE, end - start)
    shape = (first.shape[0], count, *first.shape[2:])
    yield np.zeros(shape, np.float32)
  if last is not None:
    yield levels.to_float(last)[:, None].repeat(repeats, 1)


def base_frames(module: wan_vae.WanVAE, frames: int) -> int:
  """Of a clip's frames, those that Wan's autoencoder takes."""
  return module.whole_frames(frames, "official")


def deep_frames(module: dc_ae_v.DCAEV, frames: int) -> int:
  """The same number, checked.

  Raises:
    errors.UserError: if it is no multiple of `temporal_factor`.
  """
  if frames <= 0 or frames % module.temporal_factor:
    raise errors.UserError(
      f"DC-AE-V takes a multiple of {module.temporal_factor} frames, found "
      f"{frames}"
    )
  return frames
