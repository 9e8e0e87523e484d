"""Makes the training or evaluation clips of the tiny autoencoder.

  dcvideogen prepare-clips --output=DIR
  dcvideogen prepare-clips --split=heldout --output=DIR

Fetches the files of dcvideogen_jax/tiny/manifest.json. The training split is
24-frame clips of 96x96 from the videos and from pans over the photographs, in
ArrayRecord shards under DIR. The held-out split is 64-frame clips of 64x64
under DIR/frames64, and the first 16 frames of each under DIR/frames16.
The same flags give the same clips.
"""

from collections.abc import Sequence

from absl import flags

from dcvideogen_jax import errors

_SPLITS = ["train", "heldout"]

_OUTPUT = flags.DEFINE_string(
  "output", None, "Folder to make; must not exist yet.", required=True
)
_SPLIT = flags.DEFINE_enum("split", "train", _SPLITS, "Which files.")
_CLIPS = flags.DEFINE_integer(
  "clips", None, "About how many; 5000 (train) or 48 (heldout)."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Which places of the videos.", lower_bound=0
)
_EXCLUDE = flags.DEFINE_multi_string(
  "exclude", [], "Leave out manifest files of this name (may have * and ?)."
)


def main(argv: Sequence[str]) -> None:
  """Makes the clips."""
  del argv
  from dcvideogen_jax.tiny import clips

  if _CLIPS.value is not None and _CLIPS.value <= 0:
    raise errors.UserError(f"--clips must be positive, not {_CLIPS.value}")
  number, sources = clips.prepare(
    _OUTPUT.value,
    _SPLIT.value,
    count=_CLIPS.value,
    seed=_SEED.value,
    exclude=_EXCLUDE.value,
  )
  print(f"{number} clips from {sources} files in {_OUTPUT.value}")
