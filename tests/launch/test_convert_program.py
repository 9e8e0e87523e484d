"""Weights survive every way there and back, bit for bit."""

import json
import os
import shutil
import stat

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, tree
from tests.convert import checkpoints
from tests.launch import launching


def run(programs, source, output, *flags, **limits):
  finished = programs.run(
    "launch.convert",
    f"--source={source}",
    f"--output={output}",
    *flags,
    **limits,
  )
  assert finished.code == 0, finished.stderr
  assert finished.stderr == ""
  return finished.stdout


def state_dict(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


def require_equal(found, expected):
  assert found.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert found[name].dtype == expected[name].dtype, name


def test_directory_to_file_and_back(programs, model, tmp_path):
  file, again = tmp_path / "a" / "w.safetensors", tmp_path / "again"
  told = run(programs, model[0], file, "--to=torch")
  assert "60 parameters" not in told
  expected = state_dict(model[0])
  count = sum(x.size for x in expected.values())
  assert f"{len(expected)} tensors, {count:,} parameters, float32" in told
  assert f"wrote {file}" in told
  require_equal(safetensors.numpy.load_file(file), expected)

  config = tmp_path / "config.json"
  config.write_text(json.dumps(launching.CONFIG))
  run(programs, file, again, f"--config={config}", "--to=jax")
  require_equal(state_dict(again), expected)
  assert json.loads((again / "config.json").read_text()) == json.loads(
    (model[0] / "config.json").read_text()
  )
  module, _ = convert.load("dc_ae_v", again)
  assert module == model[1]


def test_dtype(programs, model, tmp_path):
  told = run(programs, model[0], tmp_path / "half", "--dtype=bfloat16")
  assert "bfloat16" in told
  expected = {
    name: x.astype(jnp.bfloat16) for name, x in state_dict(model[0]).items()
  }
  require_equal(state_dict(tmp_path / "half"), expected)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pt_is_what_torch_and_the_official_code_read(
  programs, model, tmp_path, dtype
):
  import torch

  file = tmp_path / "w.pt"
  run(programs, model[0], file, f"--dtype={dtype}")
  # The official code reads one or the other, depending on its settings.
  loaded = torch.load(file, weights_only=True)
  (averaged,) = loaded["ema_model_state_dict"].values()
  expected = {name: x.astype(dtype) for name, x in state_dict(model[0]).items()}
  for found in (averaged, loaded["model_state_dict"]):
    assert {str(x.dtype) for x in found.values()} == {f"torch.{dtype}"}
    require_equal(
      {name: x.float().numpy() for name, x in found.items()},
      {name: x.astype(np.float32) for name, x in expected.items()},
    )
  size = sum(x.nbytes for x in expected.values())
  assert file.stat().st_size < 1.5 * size, "the tensors are stored once"

  run(
    programs,
    file,
    tmp_path / "back",
    f"--config={json.dumps(launching.CONFIG)}",
  )
  require_equal(state_dict(tmp_path / "back"), expected)


def test_pt_without_torch(programs, model, tmp_path):
  finished = programs.run(
    "launch.convert",
    f"--source={model[0]}",
    f"--output={tmp_path / 'a' / 'w.pt'}",
    without=("torch",),
  )
  assert finished.code == 2
  (line,) = finished.stderr.splitlines()
  assert "pip install torch" in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("to", "output", "word"),
  [
    ("jax", "w.pt", "names a file"),
    ("jax", "w.safetensors", "names a file"),
    ("torch", "w", ".safetensors"),
    ("jax", "w.gguf", "of a kind that is not written"),
  ],
)
def test_target_and_name_disagree(programs, model, tmp_path, to, output, word):
  finished = programs.run(
    "launch.convert",
    f"--source={model[0]}",
    f"--output={tmp_path / output}",
    f"--to={to}",
  )
  assert finished.code == 2
  assert word in finished.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--to=jax", "--to=torch"])
def test_only_a_library_s_layout_is_split(programs, model, tmp_path, flag):
  output = tmp_path / ("w.pt" if flag == "--to=torch" else "w")
  finished = programs.run(
    "launch.convert",
    f"--source={model[0]}",
    f"--output={output}",
    flag,
    "--shard_gb=1",
  )
  assert finished.code == 2
  assert "--shard_gb goes with the layout of a library only" in finished.stderr


def test_other_users_may_read_the_result(programs, model, tmp_path):
  umask = os.umask(0o022)
  os.umask(umask)
  run(programs, model[0], tmp_path / "w.safetensors")
  mode = stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode)
  assert mode == 0o666 & ~umask


@pytest.mark.parametrize(
  ("name", "fields"),
  [("f32t4c128", {}), ("own configuration", {"time": "causal"})],
)
def test_a_released_variant_has_a_name(name, fields):
  from dcvideogen_jax.sample import model_names

  variants = convert.KINDS["dc_ae_v"].variants
  module = convert.KINDS["dc_ae_v"].build({**variants["f32t4c128"], **fields})
  assert model_names.variant("dc_ae_v", module) == name


# --- Wan's transformer, other libraries, updates -----------------------------


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
  """A sharded checkpoint as diffusers has it, and its tensors."""
  directory = tmp_path_factory.mktemp("transformer")
  tensors = checkpoints.state_dict("wan_dit", checkpoints.T2V, "diffusers")
  checkpoints.write_sharded(directory, tensors, 3)
  fields = convert.config_of(convert.KINDS["wan_dit"].build(checkpoints.T2V))
  config = convert.KINDS["wan_dit"].configs["diffusers"](fields)
  (directory / "config.json").write_text(json.dumps(config))
  return directory, tensors


def write_lora(path, rank=2, width=16, scale=1.0, **extra):
  """Updates of one layer, as ComfyUI has them; the full difference."""
  random = np.random.default_rng(rank)
  a = random.normal(size=(rank, width)).astype(np.float32)
  b = random.normal(size=(width, rank)).astype(np.float32)
  name = "diffusion_model.blocks.1.cross_attn.v"
  tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
  safetensors.numpy.save_file(tensors | extra, path)
  return scale * b @ a


@pytest.mark.parametrize("layout", ["diffusers", "original", "jax"])
def test_transformers_in_every_layout_and_back(
  programs, transformer, tmp_path, layout
):
  there, back = tmp_path / "there", tmp_path / "back"
  shards = [] if layout == "jax" else ["--shard_gb=0.00001"]
  told = run(
    programs, transformer[0], there, "--kind=wan_dit", f"--to={layout}", *shards
  )
  assert f"{len(transformer[1])} tensors" in told
  shards = sorted(there.glob("*-of-*.safetensors"))
  assert (len(shards) > 2) == (layout != "jax")
  assert told.count("wrote ") == len(sorted(there.glob("*.safetensors")))
  assert (there / "README.md").exists() == (layout == "diffusers")
  told = run(programs, there, back, "--kind=wan_dit", "--to=diffusers")
  assert f"{back / 'README.md'} says no licence" in told
  card = (back / "README.md").read_text()
  assert f"--source={there}" in card and "float32" in card
  found = safetensors.numpy.load_file(
    back / "diffusion_pytorch_model.safetensors"
  )
  require_equal(found, transformer[1])
  assert json.loads((back / "config.json").read_text()) == json.loads(
    (transformer[0] / "config.json").read_text()
  )


def test_a_model_card_has_the_licence_that_is_given(
  programs, transformer, tmp_path
):
  flags = ("--kind=wan_dit", "--to=diffusers", "--license=cc-by-4.0")
  told = run(programs, transformer[0], tmp_path, *flags)
  assert "licence" not in told
  card = (tmp_path / "README.md").read_text()
  assert card.startswith("---\nlibrary_name: diffusers\nlicense: cc-by-4.0\n")
  (tmp_path / "README.md").write_text("mine")
  told = run(programs, transformer[0], tmp_path, *flags)
  assert f"kept {tmp_path / 'README.md'}" in told
  assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parity
def test_flat_pt_of_another_layout(programs, transformer, tmp_path):
  import torch

  file = tmp_path / "wan.pth"
  run(programs, transformer[0], file, "--kind=wan_dit", "--to=original")
  found = torch.load(file, weights_only=True)
  assert (
    found.keys()
    == checkpoints.shapes("wan_dit", checkpoints.T2V, "original").keys()
  )


def test_updates_are_merged_and_counted(programs, transformer, tmp_path):
  extra = {
    "diffusion_model.blocks.1.cross_attn.v.alpha": np.full((), 2.0),
    "diffusion_model.head.head.diff": np.ones((3, 3)),  # Of another model.
  }
  one = write_lora(tmp_path / "a.safetensors", 2, scale=0.5, **extra)
  two = write_lora(tmp_path / "b,c.safetensors", 3)
  finished = programs.run(
    "launch.convert",
    f"--source={transformer[0]}",
    f"--output={tmp_path / 'merged.safetensors'}",
    "--kind=wan_dit",
    f"--lora={tmp_path / 'a.safetensors'},0.5,skip=interface",
    f"--lora={tmp_path / 'b,c.safetensors'}",
  )
  assert finished.code == 0, finished.stderr
  (line,) = finished.stderr.splitlines()
  assert line == (
    f"warning: {tmp_path / 'b,c.safetensors'}: no alpha is known, so it is"
    " taken to be the rank"
  )
  told = finished.stdout
  assert (
    "a.safetensors: 3 tensors matched, 1 tensors left out, 1 parameters"
    " change, rank 2," in told
  )
  assert "b,c.safetensors: 2 tensors matched" in told
  assert "scale 0.5" in told
  found = safetensors.numpy.load_file(tmp_path / "merged.safetensors")
  expected = dict(transformer[1])
  name = "blocks.1.attn2.to_v.weight"
  np.testing.assert_allclose(
    found.pop(name), expected.pop(name) + one + two, atol=1e-5
  )
  require_equal(found, expected)


def test_weights_in_eight_bits_are_rounded_after_merging(
  programs, transformer, tmp_path
):
  alpha = {"diffusion_model.blocks.1.cross_attn.v.alpha": np.full((), 2.0)}
  write_lora(tmp_path / "a.safetensors", **alpha)
  flags = ("--kind=wan_dit", "--weights=int8")
  lora = f"--lora={tmp_path / 'a.safetensors'}"
  run(programs, transformer[0], tmp_path / "eight", *flags, lora)
  module, variables = convert.load("wan_dit", transformer[0])
  update = convert.load_lora("wan_dit", tmp_path / "a.safetensors", module)
  merged = {"params": convert.merge(variables["params"], update)}
  expected = convert.in_eight_bits("wan_dit", module, merged, "int8")[1]
  module, found = convert.load("wan_dit", tmp_path / "eight")
  assert module.weights == "int8"
  require_equal(*(tree.flatten(x) for x in (found, expected)))
  for name, more in (("a", ["--to=diffusers"]), ("a.safetensors", [])):
    output = tmp_path / "new" / name
    source = f"--source={transformer[0]}"
    line = fail(programs, output, source, "--weights=int8", *more)
    assert "--weights=int8 is only written as a directory" in line
  lines = fail(
    programs, tmp_path / "new", f"--source={tmp_path / 'eight'}", lora
  )
  assert "is in int8, to which nothing can be added" in lines


def broken_copy(source, target, change):
  shutil.copytree(source, target)
  change(target)
  return target


def remove_shard(directory):
  (directory / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()


def truncate_shard(directory):
  path = directory / "diffusion_pytorch_model-00003-of-00003.safetensors"
  path.write_bytes(path.read_bytes()[:-1])


def misplace_tensor(directory):
  path = directory / "diffusion_pytorch_model.safetensors.index.json"
  index = json.loads(path.read_text())
  shard = index["weight_map"]["proj_out.bias"]
  index["weight_map"]["proj_out.bais"] = shard
  path.write_text(json.dumps(index))


def fail(programs, output, *flags, **limits):
  """The one sentence on stderr; checks that nothing was written."""
  finished = programs.run(
    "launch.convert", "--kind=wan_dit", f"--output={output}", *flags, **limits
  )
  assert finished.code == 2, finished.stderr
  assert not output.exists()
  (line,) = finished.stderr.splitlines()
  assert line.startswith("error: ")
  return line


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (remove_shard, "of which 1 are missing: diffusion_pytorch_model-00002-of"),
    (truncate_shard, "00003-of-00003.safetensors is not a whole safetensors"),
    (misplace_tensor, "do not hold them: proj_out.bais in"),
  ],
)
def test_damaged_checkpoints(programs, transformer, tmp_path, change, message):
  source = broken_copy(transformer[0], tmp_path / "source", change)
  assert message in fail(programs, tmp_path / "out", f"--source={source}")


@pytest.mark.parametrize(
  ("lora", "message"),
  [
    ("wide.safetensors", "expected (2, 16), found (2, 24)"),
    ("extra.safetensors,0.5", "unexpected diffusion_model.blocks.9.x (3,)"),
    ("nowhere.safetensors", "there is no"),
    ("fine.safetensors,nan", "the scale must be finite"),
  ],
)
def test_updates_that_do_not_fit(
  programs, transformer, tmp_path, lora, message
):
  write_lora(tmp_path / "fine.safetensors")
  write_lora(tmp_path / "wide.safetensors", width=24)
  extra = {"diffusion_model.blocks.9.x": np.ones(3, np.float32)}
  write_lora(tmp_path / "extra.safetensors", **extra)
  flags = (f"--source={transformer[0]}", f"--lora={tmp_path / lora}")
  assert message in fail(programs, tmp_path / "out", *flags)


def test_a_layout_of_another_kind(programs, transformer, tmp_path):
  line = fail(
    programs,
    tmp_path / "out",
    f"--source={transformer[0]}",
    "--to=transformers",
  )
  assert "--to=transformers is no layout of wan_dit: expected jax" in line


@pytest.mark.parametrize("layout", ["jax", "diffusers"])
def test_nothing_is_left_where_a_file_gets_too_large(
  programs, transformer, tmp_path, layout
):
  line = fail(
    programs,
    tmp_path / "out",
    f"--source={transformer[0]}",
    f"--to={layout}",
    largest_file=20_000,
  )
  assert "cannot write" in line and "File too large" in line
  assert not [*tmp_path.iterdir()]
