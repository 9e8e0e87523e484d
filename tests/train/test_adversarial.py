"""Both players' gradients against torch, and what each option does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcvideogen_jax import errors, tree
from dcvideogen_jax.models import discriminator
from dcvideogen_jax.train import adversarial, optim, step
from tests import random_weights

MODEL = {
  "latent_channels": 4,
  "widths": (8, 8, 8),
  "depths": (0, 1, 1),
  "chunk_frames": 4,
  "spatial_factor": 2,
  "temporal_factor": 2,
}
PLAIN = {"width": 4, "layers": 2, "kernel": 3, "spectral": False}
OPTIONS = {
  "plain": {"r1": 0.0, "lecam": 0.0},
  "penalties": {"r1": 0.3, "lecam": 0.2},
  "spectral": {"r1": 0.0, "lecam": 0.0, "spectral": True},
}
WEIGHTS = {"l1": 1.0, "mse": 0.5, "gan": 0.05}
AVERAGES = {"real": 0.05, "fake": -0.04}


def _config(option):
  return {
    "task": "autoencoder",
    "phase": "adversarial_all",
    "start": "random",
    "weights": None,
    "model": MODEL,
    "loss": WEIGHTS,
    "discriminator": PLAIN | OPTIONS[option],
  }


@functools.cache
def _ours(option):
  """The variables, the clips, loss and metrics, and all gradients by name."""
  task = step.build_task(_config(option))
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  variables = random_weights.like(shapes, norms=1.0)
  # Loud logits, so that both sides of the hinge count.
  own = variables["discriminator"]
  own["params"]["logits"]["kernel"] *= 30
  if "lecam" in own.get("state", {}):
    own["state"]["lecam"] = jax.tree.map(jnp.float32, AVERAGES)
  video = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 3), np.uint8)
  both = jax.jit(jax.value_and_grad(task.loss_fn, has_aux=True))
  (loss, metrics), gradients = both(variables, {"video": video})
  return (
    jax.device_get(tree.flatten(variables)),
    video,
    {"loss": float(loss), **{k: float(v) for k, v in metrics.items()}},
    jax.device_get(tree.flatten(gradients)),
  )


class _Torch:
  """The small model and its discriminator, by the names of our leaves."""

  def __init__(self, leaves):
    import torch

    self.torch, self.f = torch, torch.nn.functional
    self.leaves = {
      name: torch.from_numpy(np.array(x)).requires_grad_("/state/" not in name)
      for name, x in leaves.items()
    }

  def kernel(self, name):
    return self.leaves[f"{name}/kernel"].permute(4, 3, 0, 1, 2)

  def conv(self, name, x):
    bias = self.leaves.get(f"{name}/bias")
    return self.f.conv3d(x, self.kernel(name), bias, padding=1)

  def norm(self, name, x):
    scale, bias = (
      self.leaves[f"{name}/{kind}"].reshape(-1, 1, 1, 1)
      for kind in ("scale", "bias")
    )
    return x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() * scale + bias

  def block(self, name, x):
    y = self.conv(f"{name}/conv2", self.f.silu(self.conv(f"{name}/conv1", x)))
    return x + self.norm(f"{name}/conv2/norm", y)

  def unshuffle(self, x, t, s):
    b, c, n, h, w = x.shape
    x = x.reshape(b, c, n // t, t, h // s, s, w // s, s)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, -1, n // t, h // s, w // s)

  def shuffle(self, x, t, s):
    b, c, n, h, w = x.shape
    x = x.reshape(b, c // (t * s * s), t, s, s, n, h, w)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, -1, n * t, h * s, w * s)

  def autoencoder(self, x):
    """`b 3 t h w`, one chunk, which zeros surround in time."""
    x = self.unshuffle(self.conv("encoder/project_in/conv", x), 1, 2)
    x = self.block("encoder/stages_1/op_list_0", x)
    y = self.unshuffle(self.conv("encoder/stages_1/op_list_1/conv", x), 2, 1)
    x = y + self.unshuffle(x, 2, 1).unflatten(1, (8, 2)).mean(2)
    x = self.block("encoder/stages_2/op_list_0", x)
    x = self.conv("encoder/project_out", x)
    x = self.block(
      "decoder/stages_2/op_list_0", self.conv("decoder/project_in", x)
    )
    y = self.shuffle(self.conv("decoder/stages_1/op_list_0/conv", x), 2, 1)
    x = y + self.shuffle(x.repeat_interleave(2, 1), 2, 1)
    x = self.block("decoder/stages_1/op_list_1", x)
    x = self.f.silu(self.norm("decoder/norm_out", x))
    return self.shuffle(self.conv("decoder/project_out/conv", x), 1, 2)

  def discriminate(self, x, spectral):
    name = "discriminator/params"
    strides = {"conv_0": 2, "conv_1": 2, "conv_2": 1, "logits": 1}
    for layer, stride in strides.items():
      kernel = self.kernel(f"{name}/{layer}")
      if spectral:
        kernel = self.normalised(layer, kernel)
      bias = self.leaves[f"{name}/{layer}/bias"]
      x = self.f.conv3d(x, kernel, bias, stride=stride, padding=1)
      if layer != "logits":
        x = self.f.leaky_relu(x, 0.2)
    return x[:, 0]

  def normalised(self, layer, kernel):
    """Divides by torch's own estimate, after its step from the same vector."""
    start = self.leaves[f"discriminator/state/{layer}/u"].clone()
    module = self.torch.nn.Conv3d(*kernel.shape[1::-1], 3)
    module = self.torch.nn.utils.spectral_norm(module)
    module.weight_u.copy_(start)
    del module._parameters["weight_orig"]
    module.weight_orig = kernel
    (hook,) = module._forward_pre_hooks.values()
    found = hook.compute_weight(module, do_power_iteration=True)
    self.leaves[f"new/{layer}"] = module.weight_u
    return found


def _expected(leaves, video, option):
  """The same as `_ours`, with one backward pass for each player."""
  import torch

  net, options = _Torch(leaves), PLAIN | OPTIONS[option]
  real = torch.from_numpy(video).permute(0, 4, 1, 2, 3) / 127.5 - 1
  see = functools.partial(net.discriminate, spectral=options["spectral"])
  output = net.autoencoder(real)
  error = output - real
  reconstruction = error.abs().mean() + 0.5 * error.square().mean()
  fooled = -see(output).mean()
  last = net.leaves["decoder/project_out/conv/kernel"]
  norms = [
    torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
    for loss in (reconstruction, fooled)
  ]
  weight = 0.05 * torch.clamp(norms[0] / (norms[1] + 1e-4), 0, 1e4).detach()
  names = [n for n in net.leaves if n.startswith(("encoder", "decoder"))]
  loss = reconstruction + weight * fooled
  found = torch.autograd.grad(loss, [net.leaves[n] for n in names])
  gradients = dict(zip(names, found, strict=True))

  real = real.clone().requires_grad_()
  on_real, on_fake = see(real), see(output.detach())
  hinge = torch.relu(1 - on_real).mean() + torch.relu(1 + on_fake).mean()
  other, metrics = hinge / 2, {"d_loss": hinge / 2}
  if options["r1"]:
    (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
    metrics["r1"] = slope.square().sum((1, 2, 3, 4)).mean() / 2
    above = torch.relu(on_real - AVERAGES["fake"]).square().mean()
    below = torch.relu(AVERAGES["real"] - on_fake).square().mean()
    metrics["lecam"] = above + below
    other = other + 0.3 * metrics["r1"] + 0.2 * metrics["lecam"]
  names = [n for n in net.leaves if n.startswith("discriminator/params")]
  found = torch.autograd.grad(other, [net.leaves[n] for n in names])
  gradients |= dict(zip(names, found, strict=True))
  metrics |= {"loss": loss, "gan": fooled, "gan_weight": weight}
  metrics |= {"d_real": on_real.mean(), "d_fake": on_fake.mean()}
  return net, metrics, {n: x.numpy() for n, x in gradients.items()}


@pytest.mark.parity
@pytest.mark.parametrize("option", OPTIONS)
def test_both_players_follow_torch(option):
  leaves, video, metrics, gradients = _ours(option)
  net, expected, slopes = _expected(leaves, video, option)
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(value.item(), rel=1e-5), name
  for name, slope in slopes.items():
    scale = np.abs(slope).max()
    # Where no logit is beyond the hinge, both sides pull alike at the bias.
    assert scale > 0 or name.endswith("logits/bias"), name
    np.testing.assert_allclose(
      gradients[name], slope, rtol=0, atol=1e-5 * scale + 1e-8, err_msg=name
    )
  # Carried values are told to move to their new value.
  carried = {n: g for n, g in gradients.items() if "/state/" in n}
  assert {*gradients} == {*slopes, *carried}
  for name, slope in carried.items():
    key = name.split("/")[-2 if option == "spectral" else -1]
    if option == "spectral":
      new = net.leaves[f"new/{key}"].numpy()
    else:
      new = 0.99 * AVERAGES[key] + 0.01 * metrics[f"d_{key}"]
    np.testing.assert_allclose(leaves[name] - slope, new, atol=1e-6)


def test_each_player_has_its_optimiser():
  """Clipping by its own norm; carried values become what they shall be."""
  config = {
    "name": "sgd",
    "lr": 0.1,
    "warmup": 0,
    "schedule": "constant",
    "clip": 1.0,
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "decay": 0.0,
    "decay_mask": ((".*", False),),
  }
  params = {
    "decoder": {"kernel": jnp.zeros(2)},
    "discriminator": {
      "params": {"kernel": jnp.zeros(2)},
      "state": {"u": jnp.array([5.0, 1.0])},
    },
  }
  gradients = {
    "decoder": {"kernel": jnp.array([3.0, 4.0])},
    "discriminator": {
      "params": {"kernel": jnp.array([0.0, 100.0])},
      "state": {"u": jnp.array([2.0, -3.0])},
    },
  }
  both = optim.two_players(config, {**config, "lr": 0.5}, 10)
  updates, _ = both.update(gradients, both.init(params), params)
  moved = optax.apply_updates(params, updates)
  np.testing.assert_allclose(
    moved["decoder"]["kernel"], [-0.06, -0.08], rtol=1e-6
  )
  found = moved["discriminator"]
  np.testing.assert_allclose(found["params"]["kernel"], [0, -0.5])
  np.testing.assert_allclose(found["state"]["u"], [3, 4])
  norms = optim.norms(gradients)
  assert norms == {"grad_norm": 5.0, "d_grad_norm": 100.0}


def test_a_logit_sees_a_patch_of_its_own_clip():
  module = discriminator.PatchDiscriminator(4, 2)
  x = np.random.default_rng(0).normal(size=(2, 4, 16, 16, 3)).astype("f4")
  variables = random_weights.of(module, x)
  apply = random_weights.jitted(module)
  # Waits for the logits: jax may read x itself, which is changed below.
  before = np.asarray(apply(variables, x))
  assert before.shape == (2, 1, 4, 4)
  x[1, :, 15, 15] += 1
  changed = np.asarray(apply(variables, x) != before)
  assert changed[1, 0, 3, 3] and not changed[0].any()
  assert not changed[1, 0, 0, 0]


@pytest.mark.parametrize(
  ("config", "weight", "message"),
  [
    (None, 0.05, "needs both config.discriminator and a weight"),
    (PLAIN, 0.0, "needs both config.discriminator and a weight"),
    (PLAIN | {"norm": "batch"}, 0.05, "has the keys width, .* found 'norm'"),
    (PLAIN | {"kernel": 4}, 0.05, "kernel must be odd, found 4"),
  ],
)
def test_a_discriminator_that_does_not_fit(config, weight, message):
  with pytest.raises(errors.UserError, match=message):
    adversarial.Adversary(config, weight)


def test_frames_too_small_for_the_discriminator():
  config = _config("plain")
  config["discriminator"] = PLAIN | {"layers": 4}
  config["data"] = {"frames": 4, "height": 16, "width": 8}
  with pytest.raises(errors.UserError, match="at least 16 pixels .* 16x8"):
    step.build_task(config)
