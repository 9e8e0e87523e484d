"""Encodes captioned videos once, for training on their latents.

  dcvideogen precompute --videos=DIR --captions=FILE.jsonl \\
    --model=dc-ai/DC-Gen-Wan2.1-T2V-14B \\
    --base=Wan-AI/Wan2.1-T2V-14B-Diffusers --output=OUT
  dcvideogen precompute --videos=DIR --dry_run

Clips come from one of three sources: --videos, a folder whose captions are in a
table such as .jsonl or .csv or in .txt files beside the videos; --tfds, a TFDS
data set in the ArrayRecord format with mp4 bytes and text; or --world, the
generated world of the tiny models. Each clip is cut to its first --frames
frames at 16 per second (--fps) and resized to its bucket of --bucket. It is
encoded in float32 by DC-AE-V, by the base model's autoencoder (three frames
fewer), by the text encoder and, with --i2v, by CLIP; --i2v also adds the
latents of the first frame as a condition. Encoders that are not given are left
out.

The data source "latents" of trainings reads OUT. All GPUs or TPU chips of the
machine encode. The same command again continues an interrupted run. Several
machines that share OUT can share the work: give each --processes and its own
--process, or all processes of a pod or cluster --distributed. Processes that
are started with the same flags share the work too, as each part is locked while
it is made. The bytes of the result do not depend on interruptions, on the
number of devices or on --processes. Videos that are damaged, too short or
without a caption are listed in OUT/skipped.jsonl.
"""

import pathlib
import time
from typing import Any

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import common, distributed

_VIDEOS = flags.DEFINE_string(
  "videos", None, "Source of the clips: a folder of video files."
)
_CAPTIONS = flags.DEFINE_string(
  "captions",
  None,
  "Captions of --videos: a .jsonl, .json, .csv or .tsv table with file and"
  " caption, or file, captions and scores. Unset: the .txt files beside the"
  " videos.",
)
_TFDS = flags.DEFINE_string(
  "tfds",
  None,
  "Source of the clips, instead of --videos: name of a TFDS data set.",
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir",
  None,
  "Directory of TFDS data sets, for --tfds. Unset: TFDS's default.",
)
_WORLD = flags.DEFINE_integer(
  "world",
  None,
  "Source of the clips, instead of --videos: this number of clips of the"
  " generated world of the tiny models.",
  lower_bound=1,
)
_SPLIT = flags.DEFINE_string(
  "split", "train", "Split of the --tfds data set or of --world."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Random seed of the clips of --world.", lower_bound=0
)
_MODEL = flags.DEFINE_string(
  "model",
  None,
  "Model to take DC-AE-V from: tiny, which ships, a directory in a published"
  " layout, or a Hugging Face repository owner/name@revision.",
)
_BASE = flags.DEFINE_string(
  "base",
  None,
  "Base model to take the other encoders from, given like --model. Parts that"
  " both models have come from this one.",
)
_DC_AE_V = flags.DEFINE_string(
  "dc_ae_v",
  None,
  "Weights of DC-AE-V. Unset: those of --base or --model, if they have any.",
)
_BASE_VAE = flags.DEFINE_string(
  "base_vae",
  None,
  "Weights of the base model's autoencoder. Unset: those of --base or --model,"
  " if they have any.",
)
_TEXT_ENCODER = flags.DEFINE_string(
  "text_encoder",
  None,
  "Weights of UMT5. Unset: those of --base or --model, if they have any.",
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "Directory with UMT5's tokenizer.json. Unset: that of --base or --model, if"
  " they have one.",
)
_IMAGE_ENCODER = flags.DEFINE_string(
  "image_encoder",
  None,
  "Weights of CLIP, for --i2v. Unset: those of --base or --model, if they have"
  " any.",
)
_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "Folder to write the encoded clips to. An existing one is continued.",
)
_I2V = flags.DEFINE_bool(
  "i2v",
  False,
  "Also encode what training image to video needs: CLIP's features and the"
  " latents of the first frame.",
)
_FRAMES = flags.DEFINE_integer(
  "frames",
  80,
  "Number of frames of a clip, a multiple of 4.",
  lower_bound=4,
)
_FPS = flags.DEFINE_string(
  "fps",
  "16",
  "Frames per second of the clips; frames are chosen by their times in the"
  ' file. "file" takes every frame whatever its time, as the official training'
  " does.",
)
_BUCKET = flags.DEFINE_string(
  "bucket",
  "480",
  "Sizes that clips are resized to: the name of a set of aspect ratios, 480,"
  " 720, 1080 or 2160, or HEIGHTxWIDTH in pixels, several separated by commas.",
)
_BATCH = flags.DEFINE_integer(
  "batch",
  1,
  "Number of clips of one size that are encoded together.",
  lower_bound=1,
)
_PART = flags.DEFINE_integer(
  "part",
  256,
  "Number of clips per part. Each part is written as a whole, so a killed run"
  " loses the parts it was making.",
  lower_bound=1,
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "float32",
  ["float32", "bfloat16"],
  "dtype that latents and embeddings are stored in.",
)
_TEXT_DTYPE = flags.DEFINE_enum(
  "text_dtype",
  "float32",
  ["float32", "bfloat16"],
  "dtype that the text encoder computes in.",
)
_TEXT_TOKENS = flags.DEFINE_integer(
  "text_tokens",
  None,
  "Maximum number of tokens of a text; longer texts are cut before they are"
  " encoded. Unset: the number in a model's parts.json, or 512. The text_tokens"
  " of a training's config must not be smaller.",
  lower_bound=1,
)
_STRETCH = flags.DEFINE_bool(
  "stretch",
  False,
  "Stretch the whole first frame to CLIP's square, as the official training"
  " does, instead of cropping its middle, as the pipeline does.",
)
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt",
  None,
  "Negative prompt to encode; training uses it where it drops a text. One of"
  " wan, wan_i2v, ascii, ascii_i2v and english, or any text. Unset: wan, or"
  " wan_i2v with --i2v.",
)
_BUDGET = flags.DEFINE_float(
  "memory_budget_gib",
  8.0,
  "Device memory for encoding video, beyond the weights, in GiB. It decides in"
  " how many bands a frame is encoded, and so the last bits of the result.",
  lower_bound=1e-6,
)
_PRECISION = flags.DEFINE_enum(
  "precision",
  "high",
  ["default", "high", "highest"],
  "Precision of the autoencoders' float32 convolutions. high, as in sampling,"
  " is TF32 on a GPU and three passes on a TPU.",
)
_THREADS = flags.DEFINE_integer(
  "threads",
  None,
  "Number of threads that read videos. Unset: one per CPU core, at most 8 per"
  " device.",
  lower_bound=1,
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Only check the clips, and print what would be encoded.",
)

# Flags that only some sources of clips read.
_SOURCES_OF = {
  "captions": ("videos",),
  "data_dir": ("tfds",),
  "fps": ("videos", "tfds"),
  "seed": ("world",),
  "split": ("tfds", "world"),
}


def main(argv):
  """Checks the flags, encodes the missing parts and writes the index.

  Raises:
    errors.UserError: for flags that contradict each other, or if no clip can be
      used.
  """
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
  for flag, names in _SOURCES_OF.items():
    if given[0] not in names:
      with_names = " or ".join(f"--{name}" for name in names)
      common.refuse_flags([flag], f"goes with {with_names} only")
  if not _I2V.value:
    common.refuse_flags(["image_encoder", "stretch"], "goes with --i2v only")
  if _FRAMES.value % 4:
    raise errors.UserError(
      f"--frames must be a multiple of 4, not {_FRAMES.value}"
    )
  if _OUTPUT.value is None and not _DRY_RUN.value:
    raise errors.UserError("expected --output, or --dry_run")


def _job() -> Any:
  """Returns the `encoding.Job` that the flags describe."""
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
  """Encodes the missing parts and prints clips per second."""
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
