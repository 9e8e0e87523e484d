"""The flag --output of programs whose output is a folder of videos."""

from absl import flags

OUTPUT = flags.DEFINE_string(
  "output", None, "Directory to write the videos to.", required=True
)
