"""The phases with torch, diffusers and PEFT, on the same draws.

Torch is imported where it is used: the module itself needs none of it.
"""

import numpy as np

from dcvideogen_jax import convert
from dcvideogen_jax.convert import wan_dit

# Layers with low-rank updates, by diffusers' names; those of _BLOCK_LORA follow
# "blocks.NUMBER.".
_LORA = (
  "condition_embedder.time_embedder.linear_1",
  "condition_embedder.time_embedder.linear_2",
  "condition_embedder.time_proj",
)
_BLOCK_LORA = (
  "attn1.to_q",
  "attn1.to_k",
  "attn1.to_v",
  "attn1.to_out.0",
  "ffn.net.0.proj",
  "ffn.net.2",
)
# Prefixes of the parameters that the second and third phase train fully.
_WHOLE = ("patch_embedding.", "proj_out.", "scale_shift_table")


def tensor(x):
  import torch

  return torch.from_numpy(np.array(x))


def channels_first(x):
  return tensor(np.moveaxis(np.asarray(x), -1, 1))


class Denoiser:
  """diffusers' transformer, with the parameters of a phase trainable."""

  def __init__(self, module, params, phase, lora=None):
    """Loads this project's weights, and low-rank updates if they are given."""
    import diffusers
    import torch

    config = wan_dit.config_to(convert.config_of(module))
    config.pop("_class_name")
    self.model = diffusers.WanTransformer3DModel(**config)
    state = convert.to_torch("wan_dit", module, {"params": params})
    state = {name: torch.from_numpy(x.copy()) for name, x in state.items()}
    self.model.load_state_dict(state, strict=True)
    self.images = module.image_width is not None
    self._lora = {}
    if lora is not None:
      self._add_lora(module, lora)
    for name, x in self.model.named_parameters():
      whole = name.startswith(_WHOLE) or phase == "full"
      x.requires_grad_(whole or ".lora_" in name)

  def _add_lora(self, module, lora):
    import peft
    import torch

    targets = list(_LORA)
    targets += [
      f"blocks.{i}.{name}" for i in range(module.layers) for name in _BLOCK_LORA
    ]
    config = peft.LoraConfig(
      r=module.lora_rank,
      lora_alpha=module.lora_alpha,
      target_modules=targets,
      lora_dropout=0.0,
      bias="none",
    )
    peft.inject_adapter_in_model(config, self.model)
    found = dict(self.model.named_parameters())
    for name, value in updates(lora, module.layers).items():
      found[name].data = torch.from_numpy(value)

  def loss(self, drawn, negative):
    """Computes the weighted loss of a batch that `denoise` has drawn."""
    import torch

    x0, noise = (channels_first(drawn[key]) for key in ("deep", "noise"))
    sigma = tensor(drawn["sigma"])[:, None, None, None, None]
    x = (1 - sigma) * x0 + sigma * noise
    image = None
    if self.images:
      mask = torch.zeros(x.shape[0], 4, *x.shape[2:])
      mask[:, :, 0] = 1
      x = torch.cat([x, mask, channels_first(drawn["deep_condition"])], dim=1)
      image = tensor(drawn["image"])
    drop = tensor(drawn["drop"])[:, None, None]
    text = torch.where(drop, tensor(negative)[None], tensor(drawn["text"]))
    v = self.model(x, tensor(drawn["timestep"]), text, image).sample
    error = ((v - (noise - x0)) ** 2).mean((1, 2, 3, 4))
    return (tensor(drawn["weight"]) * error).mean()

  def trainable(self):
    return {
      name: x for name, x in self.model.named_parameters() if x.requires_grad
    }


class Aligner:
  """Two convolutions: a frozen one for the base's latents, and one to train."""

  def __init__(self, student, teacher, images):
    self.images = images
    self._teacher = _convolution(teacher).requires_grad_(False)
    self._student = _convolution(student)

  def loss(self, drawn, negative):
    import torch

    del negative
    student, teacher = (
      convolution(self._input(drawn, space))
      for convolution, space in (
        (self._student, "deep"),
        (self._teacher, "base"),
      )
    )
    teacher = torch.nn.functional.avg_pool3d(teacher, (1, 2, 2))
    return torch.nn.functional.mse_loss(student, teacher)

  def _input(self, drawn, space):
    import torch

    x = channels_first(drawn[space])
    if not self.images:
      return x
    mask = torch.zeros(x.shape[0], 4, *x.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([x, mask, channels_first(drawn[f"{space}_condition"])], 1)

  def trainable(self):
    return {
      f"patch_embedding.{name}": x
      for name, x in self._student.named_parameters()
    }


def _convolution(patch_embed):
  import torch

  kernel = np.asarray(patch_embed["kernel"]).transpose(4, 3, 0, 1, 2).copy()
  found = torch.nn.Conv3d(
    *kernel.shape[1::-1], kernel.shape[2:], kernel.shape[2:]
  )
  found.weight.data = torch.from_numpy(kernel)
  found.bias.data = tensor(patch_embed["bias"])
  return found


def train(peer, drawn, negative, optimiser, rates):
  """Trains with AdamW and clipping, as the official trainer does.

  Takes a step for each batch drawn.

  Returns:
    The losses, the first step's gradients before clipping, and the changes of
    all steps together, by name of the parameter.
  """
  import torch

  trainable = peer.trainable()
  start = {name: x.detach().clone() for name, x in trainable.items()}
  adam = torch.optim.AdamW(
    trainable.values(),
    lr=1.0,
    betas=optimiser["betas"],
    eps=optimiser["eps"],
    weight_decay=0.0,
  )
  losses, gradients = [], {}
  for batch, rate in zip(drawn, rates, strict=True):
    adam.param_groups[0]["lr"] = rate
    adam.zero_grad()
    loss = peer.loss(batch, negative)
    loss.backward()
    losses.append(loss.item())
    if not gradients:
      gradients = {n: x.grad.numpy().copy() for n, x in trainable.items()}
    if optimiser["clip"]:
      torch.nn.utils.clip_grad_norm_(trainable.values(), optimiser["clip"])
    adam.step()
  changes = {
    name: (x.detach() - start[name]).numpy() for name, x in trainable.items()
  }
  return losses, gradients, changes


def updates(lora, layers):
  """Renames this project's updates as PEFT does inside diffusers' model."""
  modules = {
    "time_embed/linear_1": _LORA[0],
    "time_embed/linear_2": _LORA[1],
    "time_proj": _LORA[2],
    **{f"blocks/self_attn/{x}": f"attn1.to_{x}" for x in "qkv"},
    "blocks/self_attn/o": "attn1.to_out.0",
    "blocks/ffn/linear_1": "ffn.net.0.proj",
    "blocks/ffn/linear_2": "ffn.net.2",
  }
  found = {}
  for ours, theirs in modules.items():
    node = lora
    for key in ours.split("/"):
      node = node[key]
    for half, name in (("a", "lora_A"), ("b", "lora_B")):
      value = np.asarray(node[half])
      if not ours.startswith("blocks/"):
        found[f"{theirs}.{name}.default.weight"] = value.T.copy()
        continue
      for i in range(layers):
        key = f"blocks.{i}.{theirs}.{name}.default.weight"
        found[key] = value[i].T.copy()
  return found
