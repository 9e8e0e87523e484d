"""Says whether a folder has the videos that VBench needs.

  dcvideogen evaluate vbench-folder --vbench=VBench_full_info.json \\
    --folder=out --output=out/vbench.json

It names the videos that are missing, that cannot be read, or that have another
size, frame rate or settings than the others, and files that have no place
there. Prints how many videos each dimension has. Exit code 2 if anything is
wrong. VBench itself scores the videos; this program computes no score.
"""

from collections.abc import Sequence

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import evaluate_flags, vbench_flags

_FOLDER = flags.DEFINE_string(
  "folder",
  None,
  "Folder of videos, or the --output of `dcvideogen sample`.",
  required=True,
)
_SIZE = flags.DEFINE_list(
  "size",
  None,
  "Frames, height and width that the videos must have. Unset: those in their"
  " settings, or of most videos where there are no settings.",
)
_EVERY_FRAME = flags.DEFINE_bool(
  "every_frame",
  False,
  "Decode all frames of each video. Unset: the first frame and the index.",
)


def main(argv: Sequence[str]) -> None:
  """Checks the folder; prints and writes what it found.

  Raises:
    errors.UserError: if --vbench is missing, or the folder is not as it must
      be.
  """
  del argv
  if vbench_flags.LIST.value is None:
    raise errors.UserError("--vbench is missing: the list that was sampled")
  size = evaluate_flags.read_size(_SIZE.value) if _SIZE.value else None
  with evaluate_flags.report() as report:
    from dcvideogen_jax.sample import vbench_folder

    listed = vbench_flags.read_list()
    report |= vbench_folder.check(
      _FOLDER.value, listed, size, _EVERY_FRAME.value
    )
    print("\n".join(vbench_folder.told(report)))
  if not report["complete"]:
    raise errors.UserError(
      f"{report['folder']} is not complete: "
      + ", ".join(
        f"{len(report[name])} {name.replace('_', ' ')}"
        for name in vbench_folder.PROBLEMS
        if report[name]
      )
    )
  print("complete")
