"""Makes videos chunk by chunk, each seeing those before it, of any length.

  dcvideogen stream --model=DIR --frames=1600 --window=2 --sink=1 \\
    --prompt="..." --prompt_at="3:..." --output=out
  dcvideogen stream --model=tiny --chunk=2 --frames=32 --window=1 \\
    --prompt="a small red ring stands still over paper" --output=out

A block-causal transformer goes on for as long as is asked for, in memory that
a window bounds. A chunk is decoded and written before the next one is begun.
Ctrl-C ends the video after the chunk that is being made. What is written is
that of `dcvideogen sample`.
"""

from collections.abc import Sequence

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import sampling
from dcvideogen_jax.sample import presets

_WINDOW = flags.DEFINE_integer(
  "window",
  None,
  "Chunks back that a chunk sees, for memory that does not grow. Unset: all,"
  " and programs are compiled for every chunk.",
)
_SINK = flags.DEFINE_integer(
  "sink", 0, "Chunks at the very beginning that are seen besides."
)
_CHUNK = flags.DEFINE_integer(
  "chunk",
  None,
  "Latent frames of a chunk. Unset: as the transformer learnt it. One that was"
  " trained on whole clips needs it, and makes worse videos.",
  lower_bound=1,
)
_CLEAN_LEVEL = flags.DEFINE_float(
  "clean_level", 0.0, "Noise level at which finished chunks are seen."
)
_CONTINUE_FROM = flags.DEFINE_string(
  "continue_from",
  None,
  "A video to go on from, stretched to the size and taken at 16 frames per"
  " second (--continue_fps). Its last whole chunks that the first new one sees"
  " come first in the file, then the --frames.",
)
_CONTINUE_FPS = flags.DEFINE_string(
  "continue_fps",
  "16",
  'Frames per second of --continue_from, taken by their times; "file" takes'
  " them as they come.",
)
_PROMPT_AT = flags.DEFINE_multi_string(
  "prompt_at",
  [],
  '"NUMBER:TEXT", a new prompt from that chunk on; 0, the first that is made,'
  " has --prompt.",
)

PRESETS = presets


def main(argv: Sequence[str]) -> None:
  """Checks, loads, and writes each video while it is made."""
  del argv
  path = _CONTINUE_FROM.value
  job = sampling.Job(needs_image=path is None)
  import tqdm

  from dcvideogen_jax.data import timing, video
  from dcvideogen_jax.sample import continuation, streams

  _check(job)
  streams.check(_WINDOW.value, _SINK.value, _CLEAN_LEVEL.value)
  continuation.prompts("", _PROMPT_AT.value)
  fps = timing.parse(_CONTINUE_FPS.value, "--continue_fps")
  if path is not None:
    video.probe(path)

  def make(pipeline, request, options):
    c = job.c
    per_chunk = streams.frames_of_chunk(pipeline, _CHUNK.value)
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
      chunk=_CHUNK.value,
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
    texts=lambda x: continuation.prompts(x, _PROMPT_AT.value).values(),
    told={
      "continue_from": path,
      "continue_fps": None if path is None else _CONTINUE_FPS.value,
    },
    stoppable=True,
  )


def _check(job: sampling.Job) -> None:
  """Refuses what streams do not have.

  Raises:
    errors.UserError: says what.
  """
  if any(request.last_image for request in job.requests):
    raise errors.UserError("a stream has no last image, found one")
  if job.c.size_rule != "exact" or job.c.condition_tail:
    raise errors.UserError(
      "config.size_rule and config.condition_tail are not for streams, which"
      " have exact sizes"
    )
