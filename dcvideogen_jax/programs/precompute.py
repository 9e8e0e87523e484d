"""Encodes captioned videos beforehand, for training on their latents.

  python -m launch.precompute --videos=DIR --captions=FILE.jsonl \\
    --model=dc-ai/DC-Gen-Wan2.1-T2V-14B \\
    --base=Wan-AI/Wan2.1-T2V-14B-Diffusers --output=OUT
  python -m launch.precompute --videos=DIR --dry_run

Clips come from --videos (captions: a table such as .jsonl or .csv, or the .txt
files beside the videos), from --tfds, a TFDS data set in the ArrayRecord format
with mp4 bytes and text, or from --world, a made-up one. Each is cut to its
first --frames frames at 16 per second (--fps), resized to its bucket of
--bucket, and encoded in float32 by DC-AE-V, by the base model's autoencoder
(three frames fewer), by the text encoder and, with --i2v, by CLIP; --i2v adds
the latents of the first frame as a condition. What is encoded is what there is
an encoder for.

OUT is read by the data source "latents". All GPUs or TPU chips of the machine
encode. The same command again continues an interrupted run; the bytes of the
result do not depend on interruptions, on the number of devices, on --workers or
on --processes, several machines that share the folder: each is told its number
by --process, or all of a pod or cluster --distributed. Two that are started
alike share the work too, as each part is locked while it is made. Videos that
are damaged, too short or without a caption are listed in OUT/skipped.jsonl.
"""

import pathlib
from typing import Any

import jax
import tqdm
from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.data import (
  buckets,
  clip_sources,
  latents,
  parts,
  timing,
  tokenize,
)
from dcvideogen_jax.precompute import encoders as encoders_lib
from dcvideogen_jax.precompute import encoding, inspection
from dcvideogen_jax.programs import distributed
from dcvideogen_jax.sample import layouts

_VIDEOS = flags.DEFINE_string("videos", None, "A folder of videos.")
_CAPTIONS = flags.DEFINE_string(
  "captions",
  None,
  "A table, .jsonl, .json, .csv or .tsv, with file and caption, or captions and"
  " scores. Unset: the .txt files beside the videos.",
)
_TFDS = flags.DEFINE_string("tfds", None, "A data set of TFDS instead.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps it.")
_WORLD = flags.DEFINE_integer(
  "world", None, "So many clips of the made-up world instead.", lower_bound=1
)
_SPLIT = flags.DEFINE_string("split", "train", "Of --tfds or --world.")
_SEED = flags.DEFINE_integer("seed", 0, "Of --world.", lower_bound=0)
_MODEL = flags.DEFINE_string(
  "model",
  None,
  'Has DC-AE-V: "tiny", a directory as published, or a Hugging Face repository'
  ' "owner/name@revision".',
)
_BASE = flags.DEFINE_string(
  "base",
  None,
  "The base model, likewise; what both have comes from here.",
)
_DC_AE_V = flags.DEFINE_string("dc_ae_v", None, "DC-AE-V, from elsewhere.")
_BASE_VAE = flags.DEFINE_string(
  "base_vae", None, "The base model's autoencoder, from elsewhere."
)
_TEXT_ENCODER = flags.DEFINE_string(
  "text_encoder", None, "UMT5, from elsewhere."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "A directory with tokenizer.json, from elsewhere."
)
_IMAGE_ENCODER = flags.DEFINE_string(
  "image_encoder", None, "CLIP, from elsewhere."
)
_OUTPUT = flags.DEFINE_string("output", None, "A folder to make or continue.")
_I2V = flags.DEFINE_bool("i2v", False, "For image to video, too.")
_FRAMES = flags.DEFINE_integer(
  "frames", 80, "Frames of a clip, a multiple of 4.", lower_bound=4
)
_FPS = flags.DEFINE_string(
  "fps",
  f"{timing.FPS:g}",
  'Frames per second, taken by their times; "file" takes them as they come, as'
  " the official training does.",
)
_BUCKET = flags.DEFINE_string(
  "bucket",
  "480",
  "Sizes: 480, 720, 1080 or 2160, or HEIGHTxWIDTH, several with commas.",
)
_BATCH = flags.DEFINE_integer(
  "batch", 1, "Clips of a size that are encoded together.", lower_bound=1
)
_PART = flags.DEFINE_integer(
  "part", 256, "Clips of a part, which a kill may lose.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", [*latents.DTYPES], "That arrays are stored in."
)
_TEXT_DTYPE = flags.DEFINE_enum(
  "text_dtype",
  "float32",
  ["float32", "bfloat16"],
  "That the text encoder computes in.",
)
_TEXT_TOKENS = flags.DEFINE_integer(
  "text_tokens",
  None,
  "Longer texts are cut to these before they are encoded. Unset: what a model's"
  f" parts.json says, or {tokenize.LENGTH}. Trainings take as many or more.",
  lower_bound=1,
)
_STRETCH = flags.DEFINE_bool(
  "stretch",
  False,
  "Show CLIP the whole first frame, stretched, as the official training does,"
  " and not the middle of it, as the pipeline does.",
)
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt",
  None,
  "Is encoded too, for what a dropped text becomes: one of"
  f" {', '.join(tokenize.NEGATIVE_PROMPTS)}, or any text. Unset: wan, or"
  " wan_i2v with --i2v.",
)
_BUDGET = flags.DEFINE_float(
  "memory_budget_gib",
  8.0,
  "For encoding video, beyond the weights. Decides how it is done, and so the"
  " last bits of the result.",
  lower_bound=1e-6,
)
_PRECISION = flags.DEFINE_enum(
  "precision",
  "high",
  ["default", "high", "highest"],
  "Of the autoencoders' float32 convolutions: high, as in sampling, is TF32 on"
  " a GPU and three passes on a TPU.",
)
_WORKERS = flags.DEFINE_integer(
  "workers",
  1,
  "Processes on this machine, for CPUs: one process uses all GPUs or TPU chips;"
  " of several each has one GPU.",
  lower_bound=1,
)
_THREADS = flags.DEFINE_integer(
  "threads",
  None,
  "That read videos. Unset: one per core, at most 8 for each device.",
  lower_bound=1,
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Look at the clips and tell what would be done."
)


def main(argv):
  """Checks, encodes what is missing, writes the index."""
  del argv
  _check_flags()
  first, step = distributed.share()
  if _WORKERS.value > 1 and jax.distributed.is_initialized():
    raise errors.UserError(
      "--workers are for one machine alone; processes that join each other use "
      "all of their devices"
    )
  source = _source()
  paths = _paths()
  if _DRY_RUN.value:
    _inspect(source, paths, range(first, len(source), step))
    return
  encoders_lib.check(paths, _I2V.value)
  job = _job(source, paths)
  parts.begin(job.output, _settings(job))
  missing = [
    number
    for number in range(first, job.count, step)
    if not parts.is_done(job.output, number)
  ]
  if missing:
    _encode(job, missing)
  distributed.wait()
  index = parts.finish(job.output, job.count)
  if index is None:
    waiting = sum(not parts.is_done(job.output, n) for n in range(job.count))
    print(f"{job.output}: {waiting} parts are left to other processes")
    return
  if not index["records"]:
    raise errors.UserError(
      f"none of {len(source)} clips can be used: {job.output / parts.SKIPPED} "
      "says why"
    )
  sizes = ", ".join(f"{k} {v['records']}" for k, v in index["buckets"].items())
  print(f"{job.output}: {index['records']} of {len(source)} clips ({sizes})")


def _check_flags() -> None:
  sources = {"videos": _VIDEOS, "tfds": _TFDS, "world": _WORLD}
  given = [name for name, flag in sources.items() if flag.value is not None]
  if len(given) != 1:
    raise errors.UserError(
      f"expected one of {', '.join('--' + name for name in sources)}, found "
      f"{', '.join('--' + name for name in given) or 'none'}"
    )
  for flag, name in ((_CAPTIONS, "videos"), (_DATA_DIR, "tfds")):
    if flag.value is not None and given != [name]:
      raise errors.UserError(f"--{flag.name} goes with --{name} only")
  if _FRAMES.value % 4:
    raise errors.UserError(
      f"--frames must be a multiple of 4, not {_FRAMES.value}"
    )
  if _OUTPUT.value is None and not _DRY_RUN.value:
    raise errors.UserError("expected --output, or --dry_run")


def _source() -> Any:
  """Of `data.clip_sources`, what the flags name."""
  if _WORLD.value is not None:
    return clip_sources.World(_WORLD.value, _SPLIT.value, _SEED.value)
  if _TFDS.value is not None:
    return clip_sources.TensorFlowDataset(
      _TFDS.value, _DATA_DIR.value, _SPLIT.value, _fps()
    )
  return clip_sources.Folder(_VIDEOS.value, _CAPTIONS.value, _fps())


def _fps() -> float | None:
  return timing.parse(_FPS.value, "--fps")


def _paths() -> layouts.Paths:
  return encoders_lib.find(
    "i2v" if _I2V.value else "t2v",
    [_BASE.value, _MODEL.value],
    {
      "dc_ae_v": _DC_AE_V.value,
      "wan_vae": _BASE_VAE.value,
      "text_encoder": _TEXT_ENCODER.value,
      "tokenizer": _TOKENIZER.value,
      "image_encoder": _IMAGE_ENCODER.value,
    },
  )


def _job(source: Any, paths: layouts.Paths) -> encoding.Job:
  prompt = _NEGATIVE.value
  if prompt is None:
    prompt = "wan_i2v" if _I2V.value else "wan"
  return encoding.Job(
    source,
    paths,
    encoders_lib.Options(
      frames=_FRAMES.value,
      batch=_BATCH.value,
      i2v=_I2V.value,
      stretch=_STRETCH.value,
      budget=_BUDGET.value * 2**30,
      precision=_PRECISION.value,
      text_dtype=_TEXT_DTYPE.value,
      text_tokens=_text_tokens(paths),
    ),
    bucket=_BUCKET.value,
    per_part=_PART.value,
    dtype=_DTYPE.value,
    negative=tokenize.NEGATIVE_PROMPTS.get(prompt, prompt),
    output=pathlib.Path(_OUTPUT.value),
    threads=_THREADS.value,
  )


def _text_tokens(paths: layouts.Paths) -> int:
  return _TEXT_TOKENS.value or paths.text_tokens or tokenize.LENGTH


def _settings(job: encoding.Job) -> dict[str, Any]:
  """What the result depends on."""
  return {
    **job.options._asdict(),
    "source": job.source.about(),
    "models": encoders_lib.digests(job.paths),
    "bucket": job.bucket,
    "part": job.per_part,
    "dtype": job.dtype,
    "negative_prompt": job.negative if job.paths.text_encoder else None,
  }


def _encode(job: encoding.Job, missing: list[int]) -> None:
  """Makes the parts that are missing, and tells how fast."""
  rate = encoding.Rate()
  total = sum(len(job.clips(number)) for number in missing)
  with tqdm.tqdm(total=total, unit="clip", disable=None) as bar:

    def done(count: int) -> None:
      rate.done(count)
      bar.update(count)

    if _WORKERS.value == 1:
      encoding.run(job, missing, rate.ready, done)
    else:
      encoding.run_workers(job, missing, _WORKERS.value, rate.ready, done)
  print(
    f"{rate.clips} clips in {rate.seconds:.1f} s, compiling included: "
    f"{rate.clips / rate.seconds:.2f} clips per second"
  )


def _inspect(source: Any, paths: layouts.Paths, mine: range) -> None:
  """Prints the report of --dry_run.

  Raises:
    errors.UserError: if no clip can be used.
  """
  encoders = inspection.modules(paths, _I2V.value)
  deep = encoders.get("dc_ae_v")
  sizes = buckets.find(
    _BUCKET.value, 32 if deep is None else deep.spatial_factor
  )
  found = inspection.inspect(
    source,
    mine,
    _FRAMES.value,
    sizes,
    "text_encoder" in encoders,
    _THREADS.value or encoding.reading_threads(),
  )

  def size_of(clip: inspection.Found) -> int:
    return inspection.clip_bytes(
      encoders,
      clip.size,
      _FRAMES.value,
      clip.captions,
      _I2V.value,
      _DTYPE.value,
    )

  notes = []
  if cut := inspection.cut(found, paths.tokenizer, _text_tokens(paths)):
    notes.append(
      f"{cut} captions would be cut to their first {_text_tokens(paths)} tokens"
    )
  notes += inspection.repeating(found, _fps())
  print(inspection.report(found, size_of, notes))
  if found and all(x.reason is not None for x in found):
    raise errors.UserError(f"none of {len(found)} clips can be used")
