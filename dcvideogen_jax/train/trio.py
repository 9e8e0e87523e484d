"""Student, teacher and critic of a distillation: weights and velocities.

With low-rank updates all three share the frozen parameters. A teacher with
weights of its own (`distil.teacher`) sees whole clips, and so does the critic,
which then starts as this teacher.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import convert, errors, sharding, tree
from dcvideogen_jax.adapt import align as align_lib
from dcvideogen_jax.adapt import phases
from dcvideogen_jax.convert import lora as lora_lib
from dcvideogen_jax.diffusion import flow
from dcvideogen_jax.latents import denoiser
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.train import denoise, rollout, weights
from dcvideogen_jax.train import task as task_lib

KINDS = ("guidance", "consistency", "matching")
_KEYS = {"kind", "guidance", "levels", "lora"}
# Attention that has no forward-mode derivative.
_NO_JVP = ("by_chunks", "cudnn", "pallas", "splash")


class Trio(denoise.Denoising):
  """The three transformers of a distillation."""

  def __init__(self, config: Mapping[str, Any], phase: phases.Phase):
    super().__init__({**config, "text_dropout": 0.0}, phase)
    found = config["distil"]
    if set(found) - {"teacher"} != _KEYS:
      raise errors.UserError(
        f"distil needs exactly the keys {', '.join(sorted(_KEYS))}, and may "
        f"have teacher; found {sorted(found)}"
      )
    self._kind = errors.choose(
      "distil.kind", found["kind"], dict(zip(KINDS, KINDS, strict=True))
    )
    self._scale, self._lora = float(found["guidance"]), found["lora"]
    self._levels = flow.explicit(found["levels"]).sigmas[:-1]
    self._drops = config["negative"]
    self._source = found.get("teacher")
    # What teacher and critic see of a clip.
    seen = None if self._source else self._module.chunk
    self._plain = self._module.clone(lora_rank=0, lora_alpha=0.0)
    self._judge = self._plain.clone(chunk=seen)
    self._rival = self._module.clone(chunk=seen)
    if self._source:
      # A teacher of whole clips knows one noise level for a clip.
      self._forcing = self._forcing._replace(per_chunk=False)
    if self._module.chunk is not None:
      self._require_streaming()
    if self._kind == "consistency":
      _require_forward_mode(self._module)
    if self._lora and not phase.lora:
      raise errors.UserError(
        "distil.lora is for phases with low-rank updates: expected phase "
        f"guidance or few, found {config['phase']}"
      )

  def _require_streaming(self) -> None:
    """Refuses what a block-causal student cannot be taught by.

    Raises:
      errors.UserError: says what to change.
    """
    found = f"found config.model.chunk {self._module.chunk}"
    if self._kind == "consistency":
      raise errors.UserError(
        "distil.kind 'consistency' is of whole clips, as the attention of "
        "chunks has no forward-mode derivative: expected 'guidance' or "
        f"'matching', {found}"
      )
    if self._kind == "guidance" and self._source:
      raise errors.UserError(
        "distil.teacher sees whole clips, and its velocity is no target for a "
        "chunk that sees clean ones before it: expected distil.kind "
        f"'matching', {found}"
      )
    judged = self._source or self._forcing.clean is not None
    if self._kind == "matching" and not judged:
      raise errors.UserError(
        "distil.kind 'matching' judges a chunk after clean ones: expected "
        f"causal=teacher (config.forcing.clean), or a distil.teacher, {found}"
      )

  def init(self, rng: jax.Array) -> dict[str, Any]:
    found = super().init(rng)
    own = "lora" if "lora" in found else "params"
    if own == "params" or self._source:
      found["teacher"] = self._teacher_init(rng)["params"]
    if self._kind == "matching":
      found["critic"] = {own: found[own]}
    return found

  @property
  def _teacher_init(self) -> weights.Init:
    """rng -> parameters of a teacher, in the dtypes of frozen ones."""
    return weights.init(self._judge, self._config["start"], phases.NOTHING_ELSE)

  def start(self, where: Mapping[str, Any]) -> dict[str, Any]:
    found = super().start(where)
    own = "lora" if "lora" in found else "params"
    fresh = found[own]
    if self._lora:
      found["lora"] = self._adapter(fresh)
    if self._source:
      given = {"base": None, "weights": self._source, "patch_embed": None}
      found["teacher"] = weights.load(
        {**self._config["start"], **given},
        self._judge,
        self._teacher_init,
        {"params": where["teacher"]},
        self._config["seed"],
      )["params"]
    elif own == "params":
      frozen = jax.eval_shape(self._teacher_init, jax.random.key(0))
      found["teacher"] = _copies(fresh, frozen["params"])
    if self._kind == "matching":
      critic = found[own]
      if self._source:
        # Fresh updates are zero: this critic starts as the teacher.
        critic = fresh if own == "lora" else found["teacher"]
      found["critic"] = {own: _copies(critic, fresh)}
    return found

  def _adapter(self, fresh: Any) -> Any:
    """Reads low-rank updates into arrays placed like `fresh`."""
    read = convert.load_lora("wan_dit", self._lora, self._plain)
    rank, alpha = self._module.lora_rank, self._module.lora_alpha
    if read.rank != rank:
      raise errors.UserError(
        f"distil.lora: {self._lora} has rank {read.rank}, expected lora.rank, "
        f"{rank}"
      )
    expected = jax.eval_shape(lambda: fresh)
    leaves = tree.flatten(lora_lib.collection(read, expected))
    # The files' factors include the scale that the model multiplies by.
    leaves = {
      name: x * rank / alpha if name.endswith("/b") else x
      for name, x in leaves.items()
    }
    return jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding),
      jax.tree.unflatten(jax.tree.structure(fresh), leaves.values()),
      fresh,
    )

  def _given(
    self,
    drawn: task_lib.LatentBatch,
    text: jax.Array,
    clean: wan_dit.Clean | None,
    frames: slice = slice(None),
  ) -> dict[str, Any]:
    """Returns the conditions of a velocity, as `denoiser.velocity` does."""
    found: dict[str, Any] = {"text": text}
    if self._images:
      c = drawn[self._condition]
      extra = align_lib.condition(c, c)[..., c.shape[-1] :]
      found |= {"image": drawn["image"], "extra": extra[:, frames]}
    return found if clean is None else found | {"clean": clean}

  def _times(self, sigma, x):
    """Returns timesteps of noise levels: (b,), or (b, frames of tokens)."""
    frames = x.shape[1]
    times = sigma * flow.TRAIN_STEPS
    return self._forcing.by_frame(times, frames, self._forcing.patch)

  def _noisy(self, x0, noise, sigma):
    return flow.add_noise(x0, noise, self._forcing.by_frame(sigma, x0.shape[1]))

  def _level(self, sigma, x):
    """Returns noise levels, by sample or by chunk, that multiply x."""
    return rollout.per_sample(self._forcing.by_frame(sigma, x.shape[1]), x)

  def _student(
    self,
    variables,
    x,
    sigma,
    drawn,
    clean=None,
    frames=slice(None),
    past=(),
    module=None,
  ):
    """Returns the student's velocity, or the critic's, in float32.

    Args:
      variables: of the student, or of `module`.
      x: noisy latents of `frames`.
      sigma: their noise levels, (b,) or (b, chunks).
      drawn: the batch.
      clean: copies for teacher forcing, or None.
      frames: the latent frames of the clip that `x` has.
      past: KV caches of the chunks before them.
      module: the transformer; None is the student's.
    """
    own = {k: variables[k] for k in ("params", "lora") if k in variables}
    return denoiser.velocity(
      module or self._module,
      False,
      True,
      sharding.constrain(x, "batch"),
      self._times(sigma, x),
      own,
      jnp.float32(1),
      self._given(drawn, drawn["text"], clean, frames),
      None,
      (past,),
    )

  def _critic(self, variables, x, sigma, drawn, clean=None):
    params = variables.get("teacher", variables["params"])
    own = {"params": params, **variables["critic"]}
    return self._student(own, x, sigma, drawn, clean, module=self._rival)

  def _teacher(self, variables, x, sigma, drawn, clean=None):
    """Returns the teacher's guided velocity, which is not differentiated."""
    text = drawn["text"]
    negative = self._dropped(variables, text)
    params = variables.get("teacher", variables["params"])
    return jax.lax.stop_gradient(
      denoiser.velocity(
        self._judge,
        self._scale != 1,
        True,
        sharding.constrain(x, "batch"),
        self._times(sigma, x),
        {"params": params},
        jnp.float32(self._scale),
        self._given(drawn, text, clean),
        self._given(drawn, jnp.broadcast_to(negative, text.shape), clean),
      )
    )

  def _cache(self, drawn, variables, x0, frames, past):
    """Returns the KV caches up to a chunk that the student has made."""
    own = {k: variables[k] for k in ("params", "lora") if k in variables}
    level = self._forcing.clean or 0.0
    if level:
      x0 = flow.add_noise(x0, drawn["clean_noise"][:, frames], level)
    t = jnp.full(len(x0), level * flow.TRAIN_STEPS, jnp.float32)
    given = self._given(drawn, drawn["text"], None, frames)
    found = denoiser.cache(self._module, True, x0, t, own, given, None, (past,))
    return (*past, *found)


def _require_forward_mode(module: Any) -> None:
  """Refuses kernels that cannot be differentiated in forward mode.

  Raises:
    errors.UserError: names the kernel.
  """
  if module.attention in _NO_JVP:
    raise errors.UserError(
      f"attention {module.attention!r} has no forward-mode derivative, which "
      "distil.kind 'consistency' takes: expected config.model.attention "
      "'chunked' or 'reference'"
    )
  if module.weights in ("int8", "float8"):
    raise errors.UserError(
      f"kernels in {module.weights} have no forward-mode derivative, which "
      "distil.kind 'consistency' takes: expected config.weights unset"
    )


def _copies(values: Any, like: Any) -> Any:
  """Copies arrays, in the dtypes of those of another tree."""
  return jax.tree.map(
    lambda x, like: jnp.array(x, like.dtype, copy=True), values, like
  )
