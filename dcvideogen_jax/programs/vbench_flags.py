"""Flags of VBench's prompt lists, for `sample` and `evaluate vbench-folder`."""

from typing import Any

from absl import flags

LIST = flags.DEFINE_string(
  "vbench",
  None,
  "VBench's list of prompts: VBench_full_info.json, vbench2_i2v_full_info.json,"
  " or a text file with a prompt per line. Videos are named PROMPT-K.mp4, K"
  " from 0 to 4, or to 24 for prompts of temporal flickering.",
)
DIMENSIONS = flags.DEFINE_list(
  "vbench_dimensions",
  [],
  "Dimensions of VBench whose prompts are taken, separated by commas. Unset:"
  " all.",
)
SAMPLES = flags.DEFINE_integer(
  "vbench_samples",
  None,
  "Videos per prompt. Unset: 5, and 25 for prompts of temporal flickering.",
  lower_bound=1,
)


def read_list() -> Any:
  """Returns the `vbench.Listed` of the flags; tells what is not as usual.

  Raises:
    errors.UserError: as `vbench.read`.
  """
  from dcvideogen_jax.sample import vbench

  listed = vbench.read(LIST.value, DIMENSIONS.value, SAMPLES.value)
  if not any(prompt.dimensions for prompt in listed.prompts):
    print(
      f"{LIST.value} does not say which prompts are of temporal flickering, so"
      f" each has {listed.prompts[0].samples} videos"
    )
  return listed
