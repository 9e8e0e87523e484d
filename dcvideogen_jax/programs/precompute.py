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
result do not depend on interruptions, on the number of devices or on
--processes, several machines that share the folder: each is told its number by
--process, or all of a pod or cluster --distributed. Two that are started alike
share the work too, as each part is locked while it is made. Videos that
are damaged, too short or without a caption are listed in OUT/skipped.jsonl.
"""

import pathlib
import time
from typing import Any

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import distributed

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
  "16",
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
  "dtype", "float32", ["float32", "bfloat16"], "That arrays are stored in."
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
  " parts.json says, or 512. Trainings take as many or more.",
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
  "Is encoded too, for what a dropped text becomes: one of wan, wan_i2v, ascii,"
  " ascii_i2v, or any text. Unset: wan, or wan_i2v with --i2v.",
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
  from dcvideogen_jax.data import parts
  from dcvideogen_jax.precompute import encoders, inspection

  job = _job()
  if _DRY_RUN.value:
    clips = range(first, len(job.source), step)
    report, usable = inspection.report(job, clips)
    print(report)
    if clips and not usable:
      raise errors.UserError(f"none of {len(clips)} clips can be used")
    return
  encoders.check(job.paths, _I2V.value)
  parts.begin(job.output, job.settings())
  if missing := job.missing(range(first, job.count, step)):
    _encode(job, missing)
  distributed.wait()
  index = parts.finish(job.output, job.count)
  if index is None:
    left = len(job.missing(range(job.count)))
    print(f"{job.output}: {left} parts are left to other processes")
    return
  if not index["records"]:
    raise errors.UserError(
      f"none of {len(job.source)} clips can be used: "
      f"{job.output / parts.SKIPPED} says why"
    )
  sizes = ", ".join(f"{k} {v['records']}" for k, v in index["buckets"].items())
  print(
    f"{job.output}: {index['records']} of {len(job.source)} clips ({sizes})"
  )


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


def _job() -> Any:
  """The `encoding.Job` that the flags ask for."""
  from dcvideogen_jax.data import clip_sources, timing, tokenize
  from dcvideogen_jax.precompute import encoders, encoding

  fps = timing.parse(_FPS.value, "--fps")
  if _WORLD.value is not None:
    source = clip_sources.World(_WORLD.value, _SPLIT.value, _SEED.value)
  elif _TFDS.value is not None:
    source = clip_sources.TensorFlowDataset(
      _TFDS.value, _DATA_DIR.value, _SPLIT.value, fps
    )
  else:
    source = clip_sources.Folder(_VIDEOS.value, _CAPTIONS.value, fps)
  paths = encoders.find(
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
  prompt = _NEGATIVE.value
  if prompt is None:
    prompt = "wan_i2v" if _I2V.value else "wan"
  return encoding.Job(
    source,
    paths,
    encoders.Options(
      frames=_FRAMES.value,
      batch=_BATCH.value,
      i2v=_I2V.value,
      stretch=_STRETCH.value,
      budget=_BUDGET.value * 2**30,
      precision=_PRECISION.value,
      text_dtype=_TEXT_DTYPE.value,
      text_tokens=_TEXT_TOKENS.value or paths.text_tokens or tokenize.LENGTH,
    ),
    bucket=_BUCKET.value,
    per_part=_PART.value,
    dtype=_DTYPE.value,
    negative=tokenize.NEGATIVE_PROMPTS.get(prompt, prompt),
    output=pathlib.Path(_OUTPUT.value or ""),
    threads=_THREADS.value,
  )


def _encode(job: Any, missing: list[int]) -> None:
  """Makes the parts that are missing, and tells how fast."""
  import tqdm

  from dcvideogen_jax.precompute import encoding

  start, total = time.perf_counter(), sum(len(job.clips(n)) for n in missing)
  with tqdm.tqdm(total=total, unit="clip", disable=None) as bar:
    clips = encoding.run(job, missing, bar.update)
  seconds = time.perf_counter() - start
  print(
    f"{clips} clips in {seconds:.1f} s, loading and compiling included: "
    f"{clips / seconds:.2f} clips per second"
  )
