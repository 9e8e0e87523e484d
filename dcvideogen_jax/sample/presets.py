"""Sampling defaults per model: size, steps, guidance.

    dcvideogen sample --config=dc-t2v-14b,size=720p --prompt="..." --output=out

--config= takes the name of a model and, after commas, `size` and `target`, a
TPU slice whose chips share each video. --config.steps=20 overrides a value.
Steps and guidance scale are those of arXiv 2509.25182 and of the released
scripts. `shift` is read from the checkpoint's scheduler unless it is set here.
For image to video the size is an area: the video keeps the image's shape.

The table is for T2V, compiled ahead of time without the hardware (`dcvideogen
plan`, jax 0.10.2): weights and peak memory of one device in GiB, and a lower
bound on the seconds of a guided step. I2V with 14B takes up to 67.8 GiB on an
H100; it has not been compiled for v6e_2x4.

    model device   size   weights  peak        step
    1.3B  h100     480p    17.2   28.2 of 72.8   0.06
    1.3B  h100     720p    17.2   43.8 of 72.8   0.22
    1.3B  h100     1080p   17.2   53.4 of 72.8   0.83
    1.3B  h100     2160p   17.2   63.4 of 72.8     11
    1.3B  v6e_2x4  480p     6.0   10.3 of 31.2   0.02
    1.3B  v6e_2x4  720p     6.0   18.4 of 31.2   0.04
    1.3B  v6e_2x4  1080p    6.0   20.3 of 31.2   0.13
    1.3B  v6e_2x4  2160p    6.0   19.6 of 31.2   1.49
    14B   h100     480p    41.2   52.3 of 72.8    0.5
    14B   h100     720p    41.2   55.1 of 72.8    1.4
    14B   h100     1080p   41.2   56.7 of 72.8    4.8
    14B   h100     2160p   41.2   65.8 of 72.8     52
    14B   v6e_2x4  480p    12.0   16.3 of 31.2   0.16
    14B   v6e_2x4  720p    12.0   24.4 of 31.2   0.30
    14B   v6e_2x4  1080p   12.0   25.5 of 31.2   0.75
    14B   v6e_2x4  2160p   12.0   24.7 of 31.2   7.23
"""

import ml_collections
from ml_collections import config_dict

from dcvideogen_jax import config_parts

# Repositories, directories and shipped models; --model=owner/name@commit pins a
# commit. DC-VideoGen was first published as nvidia/DC-VideoGen-Wan2.1-14B,
# which --model takes too. CLIP for dc-i2v-14b comes from
# Wan-AI/Wan2.1-I2V-14B-720P-Diffusers. DC-VideoGen with 1.3B has not been
# published; configs/adapt.py trains it.
SOURCES = {
  "tiny": "tiny",
  "tiny-i2v": "tiny",
  "dc-t2v-1.3b": "out/dc-t2v-1.3b",
  "dc-t2v-14b": "dc-ai/DC-Gen-Wan2.1-T2V-14B",
  "dc-i2v-14b": "dc-ai/DC-Gen-Wan2.1-I2V-14B",
  "wan-t2v-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
  "wan-t2v-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
  "wan-i2v-14b": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
  "wan-i2v-14b-480p": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
  "wan-flf2v-14b": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
}
# The transformer's variant, task, frames, steps and guidance scale per model.
MODELS = {
  "tiny": (None, "t2v", 16, 20, 3.0),
  "tiny-i2v": (None, "i2v", 16, 20, 3.0),
  "dc-t2v-1.3b": ("dc-wan2.1-t2v-1.3b", "t2v", 80, 50, 3.0),
  "dc-t2v-14b": ("dc-wan2.1-t2v-14b", "t2v", 80, 50, 5.0),
  "dc-i2v-14b": ("dc-wan2.1-i2v-14b", "i2v", 80, 50, 5.0),
  "wan-t2v-1.3b": ("wan2.1-t2v-1.3b", "t2v", 81, 50, 5.0),
  "wan-t2v-14b": ("wan2.1-t2v-14b", "t2v", 81, 50, 5.0),
  "wan-i2v-14b": ("wan2.1-i2v-14b", "i2v", 81, 40, 5.0),
  "wan-i2v-14b-480p": ("wan2.1-i2v-14b", "i2v", 81, 40, 5.0),
  "wan-flf2v-14b": ("wan2.1-flf2v-14b", "i2v", 81, 50, 5.0),
}
SIZES = {
  "480p": (480, 832),
  "720p": (720, 1280),
  "1080p": (1080, 1920),
  "2160p": (2160, 3840),
}
# Mesh and sharding of the transformer's weights, per target. On a slice of 2x4
# chips each half takes one branch of the guidance. Its four chips share the
# tokens, and divide the 12 or 40 heads evenly.
_TARGETS = {
  "any": (config_parts.mesh(), config_parts.SAMPLE_SHARDING),
  "v6e_2x4": (
    config_parts.mesh(data=2, context=4),
    config_parts.sample_sharding("fsdp", "context"),
  ),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config for an argument such as "dc-t2v-14b,size=720p"."""
  arg = config_parts.parse_arg(
    arg,
    {
      "model": tuple(MODELS),
      "size": ("default", *SIZES),
      "target": tuple(_TARGETS),
    },
  )
  c = ml_collections.ConfigDict()
  # The transformer that `dcvideogen plan` assumes, since it reads no weights.
  c.variant = config_dict.placeholder(str)
  c.model = SOURCES[arg.model]
  c.variant, c.task, c.frames, c.steps, c.guidance_scale = MODELS[arg.model]
  if c.model == "tiny":
    height, width = 64, 64
  elif arg.model == "wan-i2v-14b-480p" or c.task == "t2v":
    height, width = SIZES["480p"]
  else:
    height, width = SIZES["720p"]
  if arg.size != "default":
    height, width = SIZES[arg.size]
  # If height and width are None, the video has the image's shape and this area.
  c.area = height * width
  c.height, c.width = (config_dict.placeholder(int) for _ in range(2))
  if c.task == "t2v":
    c.height, c.width = height, width
  # The transformer's attention, a name of `ops.attention`; None chooses the
  # best for the device.
  c.attention = config_dict.placeholder(str)
  # "exact" keeps the size; "official" rounds it down (720 rows become 704).
  c.size_rule = "exact"
  # How image to video encodes frames that do not fill the autoencoder's chunk:
  # "pad" repeats the last frame; "official" pads with zeros; None follows the
  # size rule.
  c.condition_tail = config_dict.placeholder(str)
  c.shift = config_dict.placeholder(float)
  # Solver ("unipc", "dpm++", "euler" or "renoise") and grid of noise levels;
  # None takes the checkpoint's.
  c.solver = config_dict.placeholder(str)
  c.grid = config_dict.placeholder(str)
  # The noise levels themselves, from 1 down, instead of a grid; the network
  # gets them without rounding.
  c.levels = config_dict.placeholder(tuple)
  # Few steps of distilled weights, a name of `diffusion.few`; it settles
  # levels, solver and guidance.
  c.few = config_dict.placeholder(str)
  # A text, or the name of one: "wan", "wan_i2v", "english". None takes Wan's
  # own for the task.
  c.negative_prompt = config_dict.placeholder(str)
  # Whether both branches of the guidance share one batch; None decides by the
  # number of tokens.
  c.batched = config_dict.placeholder(bool)
  # How several devices share the computation and the weights.
  c.mesh, c.sharding = _TARGETS[arg.target]
  # None is bfloat16, but float32 on a CPU.
  c.dtype = config_dict.placeholder(str)
  # The kernels in the blocks of the transformer and of UMT5: "int8", "float8",
  # or "bfloat16" for the dtype above; None is as the files hold them.
  c.weights = config_dict.placeholder(str)
  return c
