"""The ablation of DC-AE-V's training: what each term of the recipe pays.

Every arm continues the tiny autoencoder that ships, for the same number of
steps, on the same clips in the same order, and is measured on held-out clips.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from dcvideogen_jax import files
from dcvideogen_jax.tiny import chain

_SHIPPED = "dcvideogen_jax/assets/dc_ae_v_tiny"
_CONFIG = "configs/tiny.py:autoencoder"
# Flags of every arm: clips alone, without the generated motion.
_SAME = (
  "--config.start=weights",
  f"--config.weights={_SHIPPED}",
  "--config.data.source=records",
  "--config.data.path={work}/clips",
  "--config.val.data.path={work}/heldout_clips/frames16",
  "--config.val.every=0",
  "--config.optim.schedule=cosine",
)
_NO_IMAGES = "--config.data.images=0.0"
# Title, phase and flags of each arm.
ARMS: Mapping[str, tuple[str, str, Sequence[str]]] = {
  "l1": ("L1", "pixels", ("--config.loss.mse=0.0",)),
  "lpips": ("L1 + LPIPS", "low", (_NO_IMAGES,)),
  "images": ("+ images, 20 %", "low", ()),
  "wavelet": (
    "+ wavelet",
    "low",
    (_NO_IMAGES, "--config.loss.wavelet=0.5"),
  ),
  "gan_last": ("+ GAN, last layers", "adversarial", (_NO_IMAGES,)),
  "gan_all": ("+ GAN, all layers", "adversarial_all", (_NO_IMAGES,)),
}
_NETS = ("alex", "vgg")
_COLUMNS = {
  "PSNR": ("alex", "psnr", 2),
  "SSIM": ("alex", "ssim", 4),
  "LPIPS, AlexNet": ("alex", "lpips", 4),
  "LPIPS, VGG-16": ("vgg", "lpips", 4),
  "FVD": ("alex", "fvd", 1),
}


def stages(seeds: Sequence[str], steps: int) -> list[chain.Stage]:
  """Returns the trainings and the measurements of every arm and seed."""
  found = [_measured("shipped", _SHIPPED, net) for net in _NETS]
  for seed in seeds:
    for arm, (_, phase, flags) in ARMS.items():
      name = f"recipe/{arm}_{seed}"
      found.append(
        chain.train(
          name,
          f"{_CONFIG},phase={phase}",
          f"--config.seed={seed}",
          f"--config.steps={steps}",
          *_SAME,
          *flags,
          group="arms",
        )
      )
      model = f"{{work}}/{name}/model"
      found += [_measured(f"{arm}_{seed}", model, net) for net in _NETS]
  return found


def _measured(name: str, model: str, net: str) -> chain.Stage:
  """Makes a stage that measures a model; FVD once, with the first net."""
  name = f"recipe/{name}_{net}"
  return chain.Stage(
    name,
    f"{name}.json",
    "launch.evaluate",
    (
      "--what=reconstruction",
      f"--model={model}",
      "--clips={work}/heldout_clips/frames16",
      f"--output={{work}}/{name}.json",
      f"--lpips={net}",
      *(["--fvd"] if net == _NETS[0] else []),
    ),
    "measured",
  )


def write(work: pathlib.Path, seeds: Sequence[str]) -> str:
  """Writes recipe/table.md from the measurements, and returns it.

  Args:
    work: folder of the chain, in which all stages are done.
    seeds: with which each arm was trained.
  """
  lines = [
    f"| training | {' | '.join(_COLUMNS)} |",
    "|---|" + "---|" * len(_COLUMNS),
    f"| none: the model that ships | {_cells(work, ['shipped'])} |",
  ]
  for arm, (title, _, _) in ARMS.items():
    names = [f"{arm}_{seed}" for seed in seeds]
    lines.append(f"| {title} | {_cells(work, names)} |")
  table = "\n".join(lines) + "\n"
  with files.atomic(work / "recipe" / "table.md") as path:
    path.write_text(table, encoding="utf-8")
  return table


def _cells(work: pathlib.Path, names: Sequence[str]) -> str:
  """Returns the means over the seeds, with the range of several."""
  cells = []
  for net, key, digits in _COLUMNS.values():
    values = [
      _read(work / "recipe" / f"{name}_{net}.json", key) for name in names
    ]
    cell = f"{sum(values) / len(values):.{digits}f}"
    if len(values) > 1:
      cell += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
    cells.append(cell)
  return " | ".join(cells)


def _read(path: pathlib.Path, key: str) -> float:
  return json.loads(path.read_text(encoding="utf-8"))[key]
