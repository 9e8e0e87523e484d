"""Makes the training or evaluation clips of the tiny autoencoder.

  dcvideogen prepare-clips --output=DIR
  dcvideogen prepare-clips --split=heldout --output=DIR

Downloads the files of dcvideogen_jax/tiny/manifest.json and cuts clips from
them. The training split has 24-frame clips of 96x96 pixels from the videos and
from pans over the photographs, in ArrayRecord shards under DIR. The held-out
split has 64-frame clips of 64x64 pixels under DIR/frames64, and the first 16
frames of each under DIR/frames16. --frames and --size make others: held-out
clips of 120 frames lie under DIR/frames120. The same flags give the same clips.
"""

from collections.abc import Sequence

from absl import flags

from dcvideogen_jax import errors

_SPLITS = ["train", "heldout"]

_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "Folder to write the clips to. It must not exist yet.",
  required=True,
)
_SPLIT = flags.DEFINE_enum(
  "split",
  "train",
  _SPLITS,
  "Files of the manifest to use: train for training clips, heldout for"
  " evaluation clips.",
)
_CLIPS = flags.DEFINE_integer(
  "clips",
  None,
  "Approximate number of clips. Unset: 5000 for train, 48 for heldout.",
)
_FRAMES = flags.DEFINE_integer(
  "frames", None, "Frames per clip. Unset: 24 for train, 64 for heldout."
)
_SIZE = flags.DEFINE_integer(
  "size",
  None,
  "Height and width of a clip in pixels. Unset: 96 for train, 64 for heldout.",
)
_SEED = flags.DEFINE_integer(
  "seed",
  0,
  "Seed of the random places at which clips are cut from the files.",
  lower_bound=0,
)
_EXCLUDE = flags.DEFINE_multi_string(
  "exclude",
  [],
  "Name of manifest files to leave out, in which * and ? are wildcards",
)


def main(argv: Sequence[str]) -> None:
  """Makes the clips.

  Raises:
    errors.UserError: if --clips, --frames or --size is not positive.
  """
  del argv
  from dcvideogen_jax.tiny import clips

  for flag in (_CLIPS, _FRAMES, _SIZE):
    if flag.value is not None and flag.value <= 0:
      raise errors.UserError(
        f"--{flag.name} must be positive, not {flag.value}"
      )
  number, sources = clips.prepare(
    _OUTPUT.value,
    _SPLIT.value,
    count=_CLIPS.value,
    frames=_FRAMES.value,
    size=_SIZE.value,
    seed=_SEED.value,
    exclude=_EXCLUDE.value,
  )
  print(f"{number} clips from {sources} files in {_OUTPUT.value}")
