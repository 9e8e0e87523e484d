"""Serves a page that makes videos, and shows them as they are decoded.

  pip install -e '.[app]'
  dcvideogen app
  dcvideogen app --config=dc-t2v-14b,size=480p --output=videos

Open the printed address in a browser of this machine. Nobody else can: the page
listens on 127.0.0.1 unless --host says otherwise, and it works without the
internet. Videos, their contact sheets and their reports are written to --output
like those of `dcvideogen sample`, and the page shows the command that makes the
same. Uploads are removed. Ctrl-C ends the page.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from absl import flags

_CONFIG = flags.DEFINE_string(
  "config",
  "tiny",
  "Preset of `dcvideogen sample`, such as tiny or dc-t2v-14b,size=720p, whose"
  " values the page begins with.",
)
_MODEL = flags.DEFINE_string(
  "model",
  None,
  "Model to sample from, as for `dcvideogen sample`. Unset: that of --config.",
)
_AUTOENCODER = flags.DEFINE_string(
  "autoencoder",
  None,
  "Weights of DC-AE-V. Unset: those in the model's directory.",
)
_IMAGE_ENCODER = flags.DEFINE_string(
  "image_encoder",
  None,
  "Weights of CLIP. Unset: those in the model's directory.",
)
_LORA = flags.DEFINE_multi_string(
  "lora",
  [],
  "LoRA or other adapter to merge into the transformer, as for `dcvideogen"
  " sample`",
)
_TEXT_ENCODER = flags.DEFINE_enum(
  "text_encoder",
  "device",
  ["device", "host"],
  "Where the text encoder is, as for `dcvideogen sample`.",
)
_WEIGHTS = flags.DEFINE_enum(
  "weights",
  None,
  ["int8", "float8", "bfloat16"],
  "Kernels in the blocks of the transformer and of the text encoder, as"
  " --config.weights of `dcvideogen sample`.",
)
_BUDGET = flags.DEFINE_float(
  "memory_budget_gib",
  None,
  "Memory for encoding and decoding with DC-AE-V, beyond the weights, in GiB."
  " Unset: 85 % of the free memory.",
  lower_bound=1e-6,
)
_OUTPUT = flags.DEFINE_string(
  "output", "out/app", "Directory to write the videos to, and to show."
)
_HOST = flags.DEFINE_string(
  "host",
  "127.0.0.1",
  "Address to listen on. 0.0.0.0 lets everyone who reaches this machine use the"
  " page.",
)
_PORT = flags.DEFINE_integer(
  "port",
  None,
  "Port to listen on. Unset: the first that is free, from 7860.",
  lower_bound=1,
  upper_bound=65535,
)
_MOST = flags.DEFINE_float(
  "max_upload_mb", 500, "Largest upload in MB (1e6 bytes).", lower_bound=0.001
)


def main(argv: Sequence[str]) -> None:
  """Loads the model and serves the page until it is interrupted."""
  del argv
  from dcvideogen_jax import files, memory
  from dcvideogen_jax.app import forms, page, serve, studio

  served = forms.Served(
    _CONFIG.value,
    _flags(),
    _OUTPUT.value,
    model=_MODEL.value,
    loras=tuple(_LORA.value),
  )
  base = forms.base(served)
  with contextlib.ExitStack() as stack:
    scratch = stack.enter_context(studio.scratch())
    serve.prepare(scratch)
    listening = serve.listen(_HOST.value, _PORT.value)
    stack.enter_context(contextlib.closing(listening))
    files.make_directory(served.output)
    memory.return_large_arrays()
    budget = _BUDGET.value and _BUDGET.value * 2**30
    made = studio.Studio(served, _models(), scratch, budget)
    made.models.get(base.task)
    app = serve.application(made, page.build(made), int(_MOST.value * 1e6))
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}", flush=True)
    if not host.startswith("127.") and host != "::1":
      print(
        "warning: everyone who reaches this machine can use the page, and see"
        f" the videos in {served.output}",
        flush=True,
      )
    serve.run(app, listening)


def _flags() -> tuple[str, ...]:
  """Returns the flags of `dcvideogen sample` for the same model but --lora."""
  given = {
    "model": _MODEL.value,
    "autoencoder": _AUTOENCODER.value,
    "image_encoder": _IMAGE_ENCODER.value,
    "text_encoder": _TEXT_ENCODER.value if _TEXT_ENCODER.present else None,
    "config.weights": _WEIGHTS.value,
    "memory_budget_gib": _BUDGET.value,
  }
  return tuple(f"--{k}={v}" for k, v in given.items() if v is not None)


def _models() -> Any:
  """Returns what loads the pipelines of the flags."""
  from dcvideogen_jax.app import loads

  return loads.Models(
    _CONFIG.value,
    model=_MODEL.value,
    autoencoder=_AUTOENCODER.value,
    image_encoder=_IMAGE_ENCODER.value,
    loras=_LORA.value,
    text_encoder=_TEXT_ENCODER.value,
    weights=_WEIGHTS.value,
  )
