"""Makes videos from prompts, and from images.

  dcvideogen sample --model=tiny --prompt="a red ball rolls" --output=out
  dcvideogen sample --config=dc-i2v-14b,size=720p --prompt="..." \\
    --image=photo.jpg --seeds=0,1 --output=out
  dcvideogen sample --config=dc-t2v-14b,size=1080p --config.mesh.context=4 \\
    --config.mesh.data=2 --prompt="..." --output=out

--config.mesh.AXIS=N sets how N devices share a video. The axis "data" splits
the two passes of the guidance (or the prompts), "context" the tokens, "tensor"
the heads and hidden features with their weights, and "spatial" the columns of
the picture in decoding.

Each prompt and seed gets three files, named `{index}_{prompt}_seed{seed}`:
  .mp4    the video, with its settings in the comment tag
  .png    a contact sheet
  .json   settings, versions, seconds per phase, memory; for each chunk of
          frames the time at which it was ready and the peak memory until then

--vbench=LIST makes the videos of a list of VBench's instead:

  dcvideogen sample --config=wan-t2v-1.3b --vbench=VBench_full_info.json \\
    --vbench_augmented=all_dimension_aug_wanx_seed42.txt --output=out

They are OUTPUT/videos/PROMPT-K.mp4, which VBench takes, and their settings
OUTPUT/settings/PROMPT-K.json. The same command again makes the videos that are
missing. With --processes=N and --process=I it makes every Nth of them, beside
N - 1 other processes; `dcvideogen evaluate vbench-folder` checks the folder.
"""

from collections.abc import Sequence

from absl import flags

from dcvideogen_jax.programs import (
  common,
  output_flag,
  sampling,
  vbench_export,
)
from dcvideogen_jax.sample import presets

_LAST_IMAGE = flags.DEFINE_string(
  "last_image",
  None,
  "Image file with the last frame of the video, for image to video. Unset: the"
  " last frame is free.",
)
_NOISE = flags.DEFINE_string(
  "noise",
  None,
  "A .npy file with the initial noise, standard normal latents of shape"
  " (t, h, w, c). Unset: the noise is drawn from each seed.",
)
_ONE_PROGRAM = flags.DEFINE_bool(
  "one_program",
  False,
  "Compile all solver steps into one program, which shows no progress.",
)

PRESETS = presets


def main(argv: Sequence[str]) -> None:
  """Makes and writes a video for each prompt and seed.

  Raises:
    errors.UserError: for --seeds with --noise, which would make equal videos.
  """
  del argv
  if _NOISE.value:
    common.refuse_flags(["seeds"], "has no effect on the noise of --noise")
  job = sampling.Job(_LAST_IMAGE.value, export=vbench_export.asked())
  import tqdm

  from dcvideogen_jax.sample import request_list

  noise = _NOISE.value and request_list.read_noise(_NOISE.value)

  def make(pipeline, request, options):
    """Makes a video, with a progress bar over the solver's steps."""
    bar = tqdm.tqdm(total=job.c.steps, unit="step", disable=None, leave=False)

    def phase(name):
      if name == "compile":
        bar.write("compiling, if these shapes are new")
      if name == "denoise":
        bar.reset()
      return job.clock.phase(name)

    with bar:
      return pipeline.generate(
        request.prompt,
        last_image=request_list.read_image(request.last_image),
        noise=noise,
        size_rule=job.c.size_rule,
        condition_tail=job.c.condition_tail,
        one_program=_ONE_PROGRAM.value,
        phase=phase,
        on_step=None if _ONE_PROGRAM.value else lambda i, x: bar.update(),
        **options,
      )

  job.run(
    make,
    output_flag.OUTPUT.value,
    texts=lambda prompt: [prompt],
    told={"noise": _NOISE.value},
    whole=True,
  )
