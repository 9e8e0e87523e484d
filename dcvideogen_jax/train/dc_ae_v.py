"""The task that trains DC-AE-V, in the phases of `autoencoder_phases`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import errors, tree
from dcvideogen_jax.models import dc_ae_v
from dcvideogen_jax.train import (
  adversarial,
  autoencoder_phases,
  autoencoders,
  fast_decoder,
  inflation,
  losses,
  perceptual,
  warm_starts,
  weights,
)
from dcvideogen_jax.train import task as task_lib

# Names of the variables that are DC-AE-V's own.
PARTS = ("encoder", "decoder")
# Terms of the loss that need more than two videos.
_OTHER_TERMS = ("lpips", "latent", "gan", *fast_decoder.TERMS)


def autoencoder(config: Mapping[str, Any]) -> task_lib.Task:
  """Builds the task that trains DC-AE-V to reconstruct clips and images.

  A batch whose clips have one frame is one of images. Each becomes
  `temporal_factor` equal frames in a chunk of its own, one latent frame.

  Args:
    config: with
      model: the fields that `dc_ae_v.build` takes.
      dtype: of the computation; "float32" if missing.
      phase: a key of `autoencoder_phases.PHASES`; "pixels" if missing.
      loss: the weight of each term, a mean each: those of `losses.TERMS`;
        "lpips"; "gan"; and "latent", the squared difference between the latents
        of the reconstruction and those of the clip, by an encoder that gets no
        gradient from it; and those of `fast_decoder.TERMS`.
      lpips: as for `perceptual.Perceptual`.
      discriminator: as for `adversarial.Adversary`.
      decoder: widths and depths of a smaller decoder, in the phase that trains
        one; None or missing in the others.
      prefixes: numbers of latent channels, one of which is drawn for each clip.
        The decoder sees that many first channels, and zeros in place of the
        others. () for all channels.
      start: a key of `warm_starts.DEEP_STARTS`; "weights"; or a key of
        `inflation.STARTS`, for weights of another model.
      weights: a checkpoint that replaces a start of the first kind, and that
        the others need; None for none.
      data, val: sizes of clips, which are checked if they are given.
      seed: of random starts.

  Raises:
    errors.UserError: for a config that does not fit.
  """
  run = _Reconstructing(config)
  return task_lib.Task(
    run.init,
    run.loss_fn,
    autoencoders.predictions(run.reconstruct, run.perceptual.measure),
    draw=run.draw,
    trainable=run.trainable,
    start=run.start,
  )


class _Reconstructing:
  """The functions of the task."""

  def __init__(self, config: Mapping[str, Any]):
    dtype = errors.choose(
      "dtype", config.get("dtype", "float32"), weights.DTYPES
    )
    build = functools.partial(dc_ae_v.build, dtype=dtype)
    self._module = autoencoders.build(build, config["model"])
    phase = config.get("phase", "pixels")
    row = autoencoder_phases.find(phase)
    stages = len(self._module.widths)
    self.trainable = autoencoder_phases.trainable(row, stages)
    self._weights = dict(config["loss"])
    self._others = {n: self._weights.pop(n, 0.0) for n in _OTHER_TERMS}
    self.perceptual = perceptual.Perceptual(
      config.get("lpips"), self._others["lpips"]
    )
    smaller, student = config.get("decoder"), None
    if bool(smaller) != row.smaller:
      expected = "the widths and depths of one" if row.smaller else "none"
      raise errors.UserError(
        f"phase {phase} trains {row.what}: expected {expected} in "
        f"config.decoder, found {smaller}"
      )
    if smaller:
      given = fast_decoder.fields(config)
      student = autoencoders.build(build, given, "config.decoder")
    self._fast = fast_decoder.Distillation(
      self._module,
      student,
      {name: self._others[name] for name in fast_decoder.TERMS},
    )
    self._adversary = adversarial.Adversary(
      config.get("discriminator"), self._others["gan"]
    )
    self._prefixes = _prefixes(config, self._module)
    self._seed, self._config = config.get("seed", 0), config
    self._from(config["start"], config["weights"], phase)
    for data in (config.get("data"), (config.get("val") or {}).get("data")):
      if data and "frames" in data:
        self._require(*(data[key] for key in ("frames", "height", "width")))

  def _from(self, start: str, path: str | None, phase: str) -> None:
    """Sets how a run begins: `_warm` alters random weights, `_read` reads."""
    plain = dict.fromkeys(("weights", *inflation.STARTS), lambda x, time: x)
    starts = {**warm_starts.DEEP_STARTS, **plain}
    self._warm = errors.choose("start", start, starts)
    self._read = autoencoders.reading("dc_ae_v", self._module, path)
    if start in plain and not path:
      raise errors.UserError(
        f"phase {phase} starts from {start}: expected a model in "
        "config.weights, found none"
      )
    if start in inflation.STARTS:
      self._read = functools.partial(self._transfer, start, path)

  def _transfer(self, start: str, path: str, where: Any) -> Any:
    """Starts from weights of another model, and tells what was taken."""
    params = jax.jit(self._init)(task_lib.start_key(self._seed))
    params, rows = inflation.STARTS[start](path, self._module, params)
    if jax.process_index() == 0:
      print(inflation.table(rows), flush=True)
    return weights.place(params, params, where)

  @property
  def start(self) -> Callable[[Any], Any] | None:
    """The task's `start`; None if nothing is read from files."""
    return self._load if self._read or self.perceptual else None

  def _require(self, frames: int, height: int, width: int) -> None:
    """Checks the size of clips; one frame is an image.

    The model would pad other clips, and learn to reconstruct the padding.
    """
    module = self._module
    multiple, size = module.frames_multiple, module.spatial_factor
    if (frames > 1 and frames % multiple) or height % size or width % size:
      raise errors.UserError(
        f"the model needs clips of a multiple of {multiple} frames and {size} "
        f"pixels, config.data gives {frames} frames of {height}x{width}"
      )
    self.perceptual.require(height, width)
    self._adversary.require(height, width)

  def init(self, rng: jax.Array) -> dict[str, Any]:
    # Each key is only its own part's, so that no part depends on the others.
    nets, other, small = _further_keys(rng)
    params = self._init(rng)
    if self._fast:
      teacher = params["decoder"]
      params |= {fast_decoder.TEACHER: teacher}
      params |= self._fast.init(small, teacher)
    return {
      **params,
      **self.perceptual.init(nets),
      **self._adversary.init(other),
    }

  def _init(self, rng):
    module, size = self._module, self._module.spatial_factor
    example = jnp.zeros((1, module.temporal_factor, size, size, 3))
    return {**self._warm(module.init(rng, example)["params"], module.time)}

  def _load(self, where: Mapping[str, Any]) -> dict[str, Any]:
    rng = task_lib.start_key(self._seed)
    nets, other, small = _further_keys(rng)
    adversary = {k: v for k, v in where.items() if k == adversarial.NAME}
    parts = {name: where[name] for name in PARTS}
    if self._fast:
      parts["decoder"] = where[fast_decoder.TEACHER]
    read = self._read or (lambda to: jax.jit(self._init, out_shardings=to)(rng))
    params = {**read(parts)}
    if self._fast:
      params |= self._student(params["decoder"], where, small)
    return {
      **params,
      **self.perceptual.load(where, nets),
      **jax.jit(self._adversary.init, out_shardings=adversary)(other),
    }

  def _student(self, teacher: Any, where: Any, rng: jax.Array) -> Any:
    """Returns a student and its teacher, and tells what it starts from."""
    fast_decoder.latent_scale(self._config)  # Or the run could not be exported.
    names = {"decoder", fast_decoder.PROJECTIONS}
    made = jax.jit(
      self._fast.init,
      out_shardings={n: x for n, x in where.items() if n in names},
    )(rng, teacher)
    if jax.process_index() == 0:
      pair = teacher, made["decoder"]
      leaves = (tree.flatten({"decoder": x}) for x in pair)
      print(inflation.table(fast_decoder.rows(*leaves)), flush=True)
    return {**made, fast_decoder.TEACHER: teacher}

  def draw(
    self, batch: task_lib.VideoBatch, rng: jax.Array
  ) -> task_lib.VideoBatch:
    clips, frames = batch["video"].shape[:2]
    first, second = jax.random.split(rng)
    drawn = {**batch}
    if self._others["lpips"]:
      # An image is several equal frames, one of which the loss sees.
      seen = min(frames, self.perceptual.frames)
      shown = self._module.temporal_factor if frames == 1 else frames
      drawn["frames"] = self.perceptual.draw(first, clips, shown, seen)
    if self._prefixes:
      choices = jnp.asarray(self._prefixes)
      drawn["channels"] = jax.random.choice(second, choices, (clips,))
    return drawn

  def _apply(self, variables, x, method: str, still: bool):
    module = self._module if method == "encode" else self._fast.student
    module = module.unchunked() if still else module
    params = {name: variables[name] for name in PARTS}
    return module.apply({"params": params}, x, method=method)

  def _encode(self, variables, batch: task_lib.VideoBatch):
    """Returns clips in [-1, 1], their latents, and whether they are images."""
    self._require(*batch["video"].shape[1:4])
    video = autoencoders.video_of(batch)
    still = video.shape[1] == 1
    if still:
      video = jnp.repeat(video, self._module.temporal_factor, axis=1)
    latents = self._apply(variables, video, "encode", still)
    return video, latents, still

  def reconstruct(
    self, variables: Mapping[str, Any], batch: task_lib.VideoBatch
  ) -> tuple[losses.Video, losses.Video]:
    video, latents, still = self._encode(variables, batch)
    output = self._apply(variables, latents, "decode", still)
    return video, output.astype(jnp.float32)

  def loss_fn(
    self, variables: Mapping[str, Any], drawn: task_lib.VideoBatch
  ) -> tuple[losses.Scalar, task_lib.Metrics]:
    with autoencoders.as_fast_as_can_be():
      video, latents, still = self._encode(variables, drawn)
      seen = latents
      if self._prefixes:
        seen = _first_channels(latents, drawn["channels"])
      output, to_last, features = self._decode(variables, seen, still)

      def distance(output):
        return self._distance(variables, drawn, video, latents, output)

      if self._adversary:
        loss, terms = self._adversary.balanced(
          distance, variables, output, to_last
        )
        other, parts = self._adversary.discriminator(variables, video, output)
        # The loss that is told is the generator's alone.
        loss += other - jax.lax.stop_gradient(other)
        terms |= parts
      else:
        loss, terms = distance(output)
      if self._fast:
        value, parts = self._fast.loss(variables, seen, still, output, features)
        loss += value
        terms |= parts
    return loss, {"psnr": losses.psnr(output, video).mean(), **terms}

  def _decode(self, variables, latents, still: bool):
    """Returns the output, a function of gradients by it, and features.

    The function gives the gradient by the last kernel. The features are those
    of a smaller decoder.
    """
    decoder = variables["decoder"]
    last = decoder["project_out"]["conv"]

    def decode(kernel):
      changed = {"project_out": {"conv": {**last, "kernel": kernel}}}
      params = {**decoder, **changed}
      if self._fast:
        return fast_decoder.decode(self._fast.student, params, latents, still)
      given = {**variables, "decoder": params}
      output = self._apply(given, latents, "decode", still)
      return output.astype(jnp.float32), {}

    output, pull, features = jax.vjp(decode, last["kernel"], has_aux=True)
    return output, lambda gradient: pull(gradient)[0], features

  def _distance(self, variables, drawn, video, latents, output):
    """Returns the weighted sum of the terms of the loss, and each term."""
    loss, terms = losses.weighted(output, video, self._weights)
    if weight := self._others["lpips"]:
      terms["lpips"] = self.perceptual.loss(
        variables, output, video, drawn["frames"]
      )
      loss += weight * terms["lpips"]
    if weight := self._others["latent"]:
      encoder = jax.lax.stop_gradient(variables)
      again = self._apply(
        encoder, output, "encode", drawn["video"].shape[1] == 1
      )
      terms["latent"] = losses.mse(
        again.astype(jnp.float32),
        jax.lax.stop_gradient(latents).astype(jnp.float32),
      )
      loss += weight * terms["latent"]
    return loss, terms


def _further_keys(rng: jax.Array) -> list[jax.Array]:
  return [jax.random.fold_in(rng, number) for number in (1, 2, 3)]


def _first_channels(latents: jax.Array, channels: jax.Array) -> jax.Array:
  """Sets a clip's latent channels from its number of `channels` on to zero."""
  kept = jnp.arange(latents.shape[-1])[None] < channels[:, None]
  return jnp.where(kept[:, None, None, None], latents, 0)


def _prefixes(
  config: Mapping[str, Any], module: dc_ae_v.DCAEV
) -> tuple[int, ...]:
  prefixes, most = tuple(config.get("prefixes") or ()), module.latent_channels
  if not all(isinstance(n, int) and 1 <= n <= most for n in prefixes):
    raise errors.UserError(
      f"config.prefixes must be numbers from 1 to the {most} latent channels, "
      f"found {prefixes}"
    )
  return prefixes
