"""Makes videos of any length, chunk by chunk; each chunk sees earlier ones.

  dcvideogen stream --model=DIR --frames=1600 --window=2 --sink=1 \\
    --prompt="..." --prompt_at="3:..." --output=out
  dcvideogen stream --model=tiny --chunk=2 --frames=32 --window=1 \\
    --prompt="a small red ring stands still over paper" --output=out

The transformer is block-causal, so a video can be as long as is asked for;
--window bounds the memory. Each chunk is decoded and written before the next
one begins. Ctrl-C ends the video after the current chunk. The files written are
those of `dcvideogen sample`.
"""

from collections.abc import Sequence

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import common, output_flag, sampling
from dcvideogen_jax.sample import presets

_WINDOW = flags.DEFINE_integer(
  "window",
  None,
  "Number of earlier chunks that a chunk attends to; it bounds the KV cache."
  " Unset: all earlier chunks, so that memory grows with the video and programs"
  " are compiled for every chunk.",
)
_SINK = flags.DEFINE_integer(
  "sink",
  0,
  "Number of chunks at the start of the video that every chunk attends to in"
  " addition to --window.",
)
_CHUNK = flags.DEFINE_integer(
  "chunk",
  None,
  "Number of latent frames of a chunk. Unset: the number that the transformer,"
  " or with --few its LoRA, was trained with. A transformer that was trained on"
  " whole clips needs this flag, and makes worse videos.",
  lower_bound=1,
)
_CLEAN_LEVEL = flags.DEFINE_float(
  "clean_level",
  0.0,
  "Noise level, from 0 (clean), of the copies of finished chunks that later"
  " chunks attend to.",
)
_CONTINUE_FROM = flags.DEFINE_string(
  "continue_from",
  None,
  "Video file to continue, stretched to the output's size and read at 16 frames"
  " per second (--continue_fps). The output begins with the last whole chunks"
  " of this file, as many as the first new chunk attends to; --frames new"
  " frames follow.",
)
_CONTINUE_FPS = flags.DEFINE_string(
  "continue_fps",
  "16",
  "Frames per second at which --continue_from is read; frames are chosen by"
  ' their times in the file. "file" takes every frame whatever its time.',
)
_PROMPT_AT = flags.DEFINE_multi_string(
  "prompt_at",
  [],
  "NUMBER:TEXT, a prompt that replaces the previous one from chunk NUMBER on."
  " Chunk 0, the first that is made, has --prompt",
)

PRESETS = presets


def main(argv: Sequence[str]) -> None:
  """Makes a video for each prompt and seed, and writes it chunk by chunk."""
  del argv
  path = _CONTINUE_FROM.value
  job = sampling.Job(needs_image=path is None, stream=True)
  import tqdm

  from dcvideogen_jax.data import timing, video
  from dcvideogen_jax.sample import continuation, few_steps, streams

  _check(job)
  in_chunks = few_steps.chunk(job.few, _CHUNK.value)
  streams.check(_WINDOW.value, _SINK.value, _CLEAN_LEVEL.value)
  continuation.prompts("", _PROMPT_AT.value)
  fps = timing.parse(_CONTINUE_FPS.value, "--continue_fps")
  if path is not None:
    video.probe(path)

  def make(pipeline, request, options):
    c = job.c
    per_chunk = streams.frames_of_chunk(pipeline, in_chunks)
    total = -(-c.frames // per_chunk) * c.steps
    if path is not None:
      first = next(video.frames(path)).rgb()
      size = pipeline.size(c.frames, c.height, c.width, c.area, first)
      seen = None if _WINDOW.value is None else _SINK.value + _WINDOW.value
      given = continuation.frames(path, fps, size, per_chunk, seen)
      options |= {"given": given, "height": size.height, "width": size.width}

    def on_step(i, x):
      del x
      bar.update()
      if i + 1 == total:
        bar.close()

    stream = pipeline.generate_stream(
      continuation.prompts(request.prompt, _PROMPT_AT.value),
      window=_WINDOW.value,
      sink=_SINK.value,
      chunk=in_chunks,
      clean_level=_CLEAN_LEVEL.value,
      phase=job.clock.phase,
      on_step=on_step,
      **options,
    )
    bar = tqdm.tqdm(
      total=total, unit="step", disable=None, leave=False, position=1
    )
    return stream

  job.run(
    make,
    output_flag.OUTPUT.value,
    texts=lambda x: continuation.prompts(x, _PROMPT_AT.value).values(),
    told={
      "continue_from": path,
      "continue_fps": None if path is None else _CONTINUE_FPS.value,
    },
    stoppable=True,
  )


def _check(job: sampling.Job) -> None:
  """Refuses settings that streams do not support.

  Raises:
    errors.UserError: for a last image, a size rule or a condition tail, and for
      --continue_fps without --continue_from.
  """
  if _CONTINUE_FROM.value is None:
    common.refuse_flags(["continue_fps"], "goes with --continue_from only")
  if any(request.last_image for request in job.requests):
    raise errors.UserError("a stream has no last image, found one")
  if job.c.size_rule != "exact" or job.c.condition_tail:
    raise errors.UserError(
      "config.size_rule and config.condition_tail are not for streams, which"
      " have exact sizes"
    )
