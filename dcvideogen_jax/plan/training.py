"""Compiles a training step for devices that are not present."""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import errors
from dcvideogen_jax.plan import (
  compiled,
  hardware,
  roofline,
  tpus,
)
from dcvideogen_jax.train import step

# Pixels per side of a CLIP patch and of a latent of Wan's autoencoder, and the
# latter's channels.
_CLIP_PATCH, _BASE_FACTOR, _BASE_CHANNELS = 14, 8, 16
_TEMPORAL_FACTOR = 4

Config = Mapping[str, Any]
Shapes = dict[str, jax.ShapeDtypeStruct]


def planned(config: Config) -> dict[str, Any]:
  """Returns a copy of a config that needs no files.

  Raises:
    errors.UserError: if the shapes of its batches depend on files.
  """
  found = copy.deepcopy(dict(config))
  if found.get("encoders"):
    raise errors.UserError(
      "a plan is of encoded clips: leave out `raw` and config.encoders"
    )
  found["negative"] = None
  model = found["model"] = dict(found["model"])
  if "heads" in model:
    found["start"] = {**found["start"], "random": True}
  else:
    found["start"] = "random"
    # `ops.conv3d` chooses "xla" on GPUs and TPUs. The step is traced on a CPU,
    # for which it would choose otherwise.
    model["conv3d"] = "xla"
  return found


def batch(config: Config) -> Shapes:
  """Returns the shapes of the arrays in a batch.

  Args:
    config: config of a training. Shapes are those of config.data, or of the
      latents of config.clips.

  Raises:
    errors.UserError: if the sizes of config.clips do not divide into latents.
  """
  data, b = config["data"], config["batch_size"]
  if data["source"] == "noise":
    sizes = data["shapes"]
  elif "clips" in config:
    sizes = _encoded(config, data["keys"])
  else:
    size = (data["frames"], data["height"], data["width"], 3)
    return {"video": jax.ShapeDtypeStruct((b, *size), jnp.uint8)}
  return {
    name: jax.ShapeDtypeStruct((b, *size), jnp.float32)
    for name, size in sizes.items()
  }


def _encoded(config: Config, keys: Any) -> dict[str, tuple[int, ...]]:
  clips, model = config["clips"], config["model"]
  factor = clips["factor"]
  frames, rest = divmod(clips["frames"], _TEMPORAL_FACTOR)
  sides = clips["height"], clips["width"]
  if rest or any(n % factor for n in sides):
    raise errors.UserError(
      f"config.clips needs multiples of {_TEMPORAL_FACTOR} frames and {factor} "
      f"pixels, found {clips['frames']} frames of {sides[0]}x{sides[1]}"
    )
  deep = (frames, *(n // factor for n in sides), model["out_channels"])
  base = (frames, *(n // _BASE_FACTOR for n in sides), _BASE_CHANNELS)
  image = (
    (clips["image_size"] // _CLIP_PATCH) ** 2 + 1,
    model.get("image_width"),
  )
  text = (config["data"]["text_tokens"], model.get("text_width", 4096))
  sizes = {"deep": deep, "base": base, "text": text, "image": image}
  return {key: sizes[key.removesuffix("_condition")] for key in keys}


def measure(config: Config, target: hardware.Target) -> dict[str, Any]:
  """Compiles a training step; returns its memory, work and time.

  Args:
    config: config of a training.
    target: the hardware to compile for.

  Returns:
    - "target", "mesh", "batch", "model", "accumulate": what was compiled.
    - "parameters": numbers of "trainable" and "frozen" parameters.
    - "bytes": memory of one device by use, the sum "peak", and "capacity".
    - "collectives": the fields of each `hlo.Collective`, with its "seconds".
    - "flops", "useful_flops", "traffic": work of one device.
    - "seconds": the fields of `roofline.Estimate` for a step, and "total".
    - "utilisation": the MFU at the estimated time.

  Raises:
    compiled.TooLarge: if the step does not fit into the device's memory.
    errors.UserError: for a config that cannot be planned.
  """
  config = planned(config)
  run = step.plan(config, target.devices)
  shapes = batch(config)
  traced = step.trace(run, config, shapes)
  convolves = "heads" not in config["model"]
  on_tpus = isinstance(target.chip, tpus.Tpu)
  quickly = convolves and on_tpus
  program = compiled.compile_traced(
    traced, compiled.QUICKLY if quickly else None
  )
  devices = [*run.mesh.devices.flat]
  useful = step.model_flops(config, shapes, target.devices) / len(devices)
  dtype = config.get("dtype", "float32")
  work = roofline.work(traced, program, len(devices), dtype, useful)
  seconds = roofline.estimate(target, work, devices)
  return {
    "target": target.name,
    "mesh": dict(run.mesh.shape),
    "batch": {name: x.shape for name, x in shapes.items()},
    "model": config["model"],
    "accumulate": config["accumulate"],
    "parameters": {
      "trainable": _numbers(run.state.params),
      "frozen": _numbers(run.frozen),
    },
    "bytes": {
      **_bytes(run, program.memory_analysis()),
      "capacity": target.chip.usable,
    },
    "collectives": [
      row._asdict()
      | {"seconds": row.bytes / roofline.rate(target, row.group, devices)}
      for row in work.collectives
    ],
    "flops": work.flops,
    "useful_flops": work.useful,
    "traffic": work.traffic,
    "seconds": vars(seconds) | {"total": seconds.total},
    "utilisation": roofline.utilisation(target, work, seconds.total),
  }


def _bytes(run: step.TrainPlan, memory: Any) -> dict[str, int]:
  """Returns the bytes of one device by use, and their sum "peak"."""
  state = run.state
  known = {
    "parameters": compiled.size(state.params),
    "optimiser": compiled.size(state.opt),
    "average": compiled.size(state.ema),
    "frozen": compiled.size(run.frozen),
  }
  arguments = memory.argument_size_in_bytes
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  found = {
    **known,
    # The batch, and the padding of rows that a device's layout needs.
    "batch": arguments - sum(known.values()),
    "outputs": outputs,
    "temporaries": memory.temp_size_in_bytes,
    "program": memory.generated_code_size_in_bytes,
  }
  return found | {"peak": sum(found.values())}


def _numbers(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))
