"""What launch.sample refuses: one sentence, exit code 2, no file left."""

import importlib.resources
import json
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from tests.launch import launching
from tests.launch.test_bad_input import require_one_sentence

SHIPPED = pathlib.Path(
  str(importlib.resources.files("dcvideogen_jax") / "assets")
)
QUICK = ("--config.steps=1", "--config.frames=4", "--config.height=32")


def refuse(programs, tmp_path, words, *flags, prompt=True, **limits):
  before = sorted(tmp_path.rglob("*"))
  finished = programs.run(
    "launch.sample",
    f"--output={tmp_path / 'a' / 'b'}",
    *(["--prompt=a cat"] if prompt else []),
    # A config comes before its overrides.
    *sorted((*QUICK, *flags), key=lambda flag: "--config=" not in flag),
    **limits,
  )
  require_one_sentence(finished, *words)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def model(tmp_path):
  """A copy of the shipped model, with its transformer in two shards."""
  directory = tmp_path / "assets" / "dcvideogen_tiny"
  shutil.copytree(SHIPPED / "dcvideogen_tiny", directory)
  shutil.copytree(SHIPPED / "dc_ae_v_tiny", tmp_path / "assets/dc_ae_v_tiny")
  transformer = directory / "transformer_t2v"
  (single,) = transformer.glob("*.safetensors")
  tensors = safetensors.numpy.load_file(single)
  single.unlink()
  names = sorted(tensors)
  index = {}
  for i, part in enumerate((names[::2], names[1::2]), 1):
    file = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
    safetensors.numpy.save_file(
      {n: tensors[n] for n in part}, transformer / file
    )
    index |= dict.fromkeys(part, file)
  (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(
    json.dumps({"metadata": {}, "weight_map": index})
  )
  return directory


def shards(model):
  return sorted((model / "transformer_t2v").glob("*.safetensors"))


def missing_shard(model):
  shards(model)[1].unlink()
  return "00002-of-00002"


def wrong_index(model):
  path = (
    model / "transformer_t2v/diffusion_pytorch_model.safetensors.index.json"
  )
  index = json.loads(path.read_text())
  first, second = (shard.name for shard in shards(model))
  names = index["weight_map"]
  moved = next(name for name, file in names.items() if file == first)
  names[moved] = second
  path.write_text(json.dumps(index))
  return moved


def truncated_shard(model):
  path = shards(model)[0]
  path.write_bytes(path.read_bytes()[:-50])
  return path.name


def no_tokenizer(model):
  shutil.rmtree(model / "tokenizer")
  return "tokenizer"


def other_scheduler(model):
  path = model / "scheduler/scheduler_config.json"
  path.write_text('{"_class_name": "DDIMScheduler"}')
  return "DDIMScheduler"


@pytest.mark.parametrize(
  "damage",
  [missing_shard, wrong_index, truncated_shard, no_tokenizer, other_scheduler],
)
def test_damaged_model(programs, tmp_path, model, damage):
  word = damage(model)
  refuse(programs, tmp_path, [word], f"--model={model}")


def test_the_copy_is_whole(programs, tmp_path, model):
  finished = programs.run(
    "launch.sample",
    f"--model={model}",
    f"--output={tmp_path / 'out'}",
    "--prompt=a cat",
    *QUICK,
  )
  assert finished.code == 0, finished.stderr


def test_lora_of_another_model(programs, tmp_path):
  random = np.random.default_rng(0)
  name = "diffusion_model.blocks.0.self_attn.q"
  lora = {
    f"{name}.lora_A.weight": random.normal(size=(4, 1536)),
    f"{name}.lora_B.weight": random.normal(size=(1536, 4)),
  }
  path = tmp_path / "lora.safetensors"
  safetensors.numpy.save_file(
    {k: v.astype(np.float32) for k, v in lora.items()}, path
  )
  refuse(programs, tmp_path, ["lora.safetensors"], f"--lora={path}")


@pytest.mark.parametrize(
  ("flag", "word"),
  [
    ("--image=none.png", "none.png"),
    ("--config.height=0", "height must be at least 1, found 0"),
    ("--config.frames=-1", "frames must be at least 1, found -1"),
    ("--config.steps=0", "steps must be at least 1, found 0"),
    ("--config.stepz=3", "no such key: stepz"),
    (f"--config={launching.ROOT}/configs/sample.py:huge", "huge"),
    ("--config.dtype=int8", "int8"),
    ("--config.solver=ddim", "ddim"),
    ("--config.size_rule=any", "any"),
    ("--config.attention=fast", "'fast'"),
    ("--config.attention=cudnn", "cudnn computes bfloat16 and float16, found"),
    ("--model=nowhere", "nowhere"),
    ("--seeds=1,x", "'x'"),
    ("--seeds=", "at least one seed"),
    ("--noise=none.npy", "none.npy"),
    ("--task=i2v", "needs an image"),
    ("--lora=none.safetensors,much", "no file none.safetensors,much"),
    (f"--lora={__file__},nan", ",nan: the scale must be finite"),
    ("--config.grid=fine", "fine"),
    ("--config.shift=0", "shift"),
    ("--config.few=fast", "config.few must be one of lightx2v, causvid"),
    ("--config.few=lightx2v", "does not go together with --config.steps"),
    ("--config.levels=(1.0,0.5,0.2)", "3 noise levels are 3 steps, found 1"),
    ("--config.levels=(0.5,1.0)", "noise levels must fall"),
  ],
)
def test_flags(programs, tmp_path, flag, word):
  refuse(programs, tmp_path, [word], flag)


def test_noise_that_is_text(programs, tmp_path):
  (tmp_path / "noise.npy").write_text("0.5 0.25")
  flag = f"--noise={tmp_path / 'noise.npy'}"
  refuse(programs, tmp_path, ["noise.npy is no .npy file of numbers"], flag)


def test_noise_in_an_archive(programs, tmp_path):
  np.savez(tmp_path / "noise.npz", np.zeros(3))
  flag = f"--noise={tmp_path / 'noise.npz'}"
  refuse(programs, tmp_path, ["is an archive"], flag)


@pytest.mark.parametrize(
  ("flags", "word"),
  [
    (("--window=2",), "Unknown command line flag 'window'"),
    (("--continue_from=x.mp4",), "Unknown command line flag 'continue_from'"),
    (("--stream",), "trained on whole clips"),
    (("--stream", "--chunk=0"), "flag --chunk=0"),
    (("--stream", "--chunk=1"), "multiples of 2 latent frames, found 1"),
    (("--stream", "--chunk=2", "--window=0"), "the window has 1 chunk"),
    (("--stream", "--chunk=2", "--sink=1"), "a sink belongs to a window"),
    (("--stream", "--chunk=2", "--clean_level=2"), "clean_level"),
    (("--stream", "--chunk=2", "--prompt_at=x"), "NUMBER:TEXT, found 'x'"),
    (("--stream", "--chunk=2", "--prompt_at=9:x"), "there is no chunk 9"),
    (("--stream", "--chunk=2", "--prompt_at=\u00b2:x"), "NUMBER:TEXT"),
    (("--stream", "--chunk=2", "--prompt_at=0:x"), "chunk 0 has a prompt"),
    (("--stream", "--chunk=2", "--noise=none.npy"), "flag 'noise'"),
    (("--stream", "--chunk=2", "--one_program"), "flag 'one_program'"),
    (("--stream", "--chunk=2", "--frames=0"), "frames must be at least 1"),
    (("--stream", "--chunk=2", "--continue_from=x.mp4"), "x.mp4"),
    (
      ("--stream", "--continue_from=x.mp4", "--continue_fps=0"),
      "--continue_fps must be",
    ),
    (("--stream", "--continue_fps=16"), "goes with --continue_from only"),
    (("--noise=x.npy", "--seeds=0,1"), "--seeds has no effect"),
    (("--few", "--config.few=causvid"), "expected no --config.few"),
    (("--few",), "few=own settles steps"),
    (("--stream", "--chunk=2", "--few"), "LoRA for streams of t2v"),
    (("--config.levels=(1.0,0.5)", "--config.shift=3"), "levels themselves"),
  ],
)
def test_flags_of_streams(programs, tmp_path, flags, word):
  refuse(programs, tmp_path, [word], *flags)


def test_too_short_to_go_on_from(programs, tmp_path):
  path = launching.write_video(tmp_path / "a.mp4", launching.clip(5, 20, 20))
  flags = ("--stream", "--chunk=2", f"--continue_from={path}")
  words = ["6 frames at 16 per second, fewer than the 8 of a chunk"]
  refuse(programs, tmp_path, words, *flags)


def test_no_prompt(programs, tmp_path):
  refuse(programs, tmp_path, ["--prompt"], prompt=False)
  empty = tmp_path / "prompts.txt"
  empty.write_text("\n \n")
  refuse(
    programs, tmp_path, ["prompts.txt"], f"--prompts={empty}", prompt=False
  )


def test_image_for_a_text_model(programs, tmp_path):
  path = tmp_path / "photo.png"
  PIL.Image.fromarray(launching.clip(1, 20, 20)[0]).save(path)
  refuse(programs, tmp_path, ["no image"], f"--image={path}", "--task=t2v")


def test_full_disk(programs, tmp_path):
  refuse(programs, tmp_path, ["cannot write"], largest_file=300)
