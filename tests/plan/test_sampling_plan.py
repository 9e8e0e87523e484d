"""The plan compiles the programs that the pipeline runs, and adds up right."""

import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dcvideogen_jax
from configs import common, sample
from dcvideogen_jax import config_parts, convert, errors, memory, tree
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.models import bands, dc_ae_v
from dcvideogen_jax.plan import (
  compiled,
  formulas,
  hardware,
  roofline,
  sampling,
)
from dcvideogen_jax.sample import denoise, loading, pipeline, placement, sizes

TINY = pathlib.Path(dcvideogen_jax.__file__).parent / "assets/dcvideogen_tiny"
SIZE = sizes.Size(40, 48, 64)
LIMIT = 2**30
PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@functools.cache
def load(task):
  return pipeline.DCVideoGen.from_pretrained(TINY, task=task)


@functools.cache
def found(task, guided=True):
  return measure(load(task).parts, guided=guided)


def measure(parts, limit=LIMIT, **options):
  chip = types.SimpleNamespace(
    usable=limit, bandwidth=2e9, flops={"float32": 1e9}
  )
  target = hardware.Target("cpu", chip, tuple(jax.devices()))
  return sampling.measure(parts, SIZE, target, **options)


def leaves(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("task", "guided"), [("t2v", False), ("t2v", True), ("i2v", True)]
)
def test_the_step_is_the_pipelines(task, guided, compiled_programs):
  made, plan = load(task), found(task, guided)
  planned = plan["phases"]["denoise"]["programs"]["step"]
  compiled_programs.clear()
  video = made.generate(
    "rain",
    image=PHOTO if made.task == "i2v" else None,
    **SIZE._asdict(),
    steps=1,
    guidance_scale=5.0 if guided else 1.0,
  )
  assert plan["latents"] == video.latents.shape[1:]
  (program,) = compiled_programs
  memory = program.memory_analysis()
  assert planned["temporaries"] == memory.temp_size_in_bytes
  assert planned["outputs"] == memory.output_size_in_bytes
  assert planned["aliased"] == memory.alias_size_in_bytes
  arguments = planned["arguments"] + plan["weights"]["transformer"]
  # Without guidance the program has no argument for the scale, 4 bytes.
  assert arguments - 4 * (not guided) == memory.argument_size_in_bytes


@pytest.mark.parametrize(
  ("task", "guided"), [("t2v", False), ("t2v", True), ("i2v", True)]
)
def test_formulas_count_the_work_without_compiling(task, guided):
  parts, plan = load(task).parts, found(task, guided)
  needs = formulas.needs(parts, SIZE, guided=guided)
  step, decode = (plan["phases"][name] for name in ("denoise", "decode"))
  # On a CPU, attention pads keys to 64, for the sum over values.
  module, clip = parts.transformer.module, parts.image_encoder
  keys = [needs.tokens, parts.texts.length]
  if clip:
    keys.append((clip.module.image_size // clip.module.patch) ** 2 + 1)
  padding = sum(64 - n for n in keys) * needs.tokens * module.width
  padding *= 2 * module.layers * (2 if guided else 1)
  assert needs.step_flops + padding == step["flops"]
  assert needs.decode_flops == decode["flops"] * decode["runs"]
  assert needs.tokens == np.prod(plan["latents"][:3])
  assert formulas.weights(parts) == plan["weights"]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_weights_and_what_earlier_phases_leave(task):
  made, plan = load(task), found(task)
  parts = made.parts
  assert plan["weights"]["transformer"] == leaves(parts.transformer.variables)
  assert plan["weights"]["autoencoder"] == leaves(parts.space.variables)
  held = {name: phase["held"] for name, phase in plan["phases"].items()}
  assert held.pop("text") == 0
  left = 2 * made.embed(["rain"]).nbytes
  if task == "i2v":
    given = made.condition(PHOTO, None, SIZE, memory_budget=LIMIT)
    assert held.pop("image") == left
    left += given["image"].nbytes
    assert held.pop("condition") == left
    left += given["extra"].nbytes
  assert held.pop("denoise") == left
  assert held == {"decode": left + 4 * np.prod(plan["latents"])}


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_peak_is_all_weights_and_the_largest_program(task):
  plan = found(task)
  used = []
  for phase in plan["phases"].values():
    for row in phase["programs"].values():
      new = row["outputs"] - row["aliased"] + row["temporaries"]
      assert row["bytes"] == row["waiting"] + row["arguments"] + new
      used.append(phase["held"] + row["bytes"])
  assert plan["peak"] == sum(plan["weights"].values()) + max(used)


@pytest.mark.parametrize("where", ["once", "host"])
def test_the_text_encoder_is_not_there_beside_the_others(where):
  usual, plan = found("t2v"), measure(load("t2v").parts, text_encoder=where)
  phases, weights = plan["phases"], dict(plan["weights"])
  assert phases["denoise"] == usual["phases"]["denoise"]
  together = max(
    phase["bytes"] + phase["held"]
    for name, phase in phases.items()
    if name != "text"
  )
  before = weights.pop("text encoder, before the others", 0)
  assert before == (usual["weights"]["text encoder"] if where == "once" else 0)
  alone = before + phases["text"]["bytes"] if where == "once" else 0
  assert weights.keys() == usual["weights"].keys() - {"text encoder"}
  assert plan["peak"] == max(sum(weights.values()) + together, alone)


def test_the_image_encoders_are_not_there_beside_the_others():
  parts, usual = load("i2v").parts, found("i2v")
  plan = measure(parts, text_encoder="once")
  phases, held = plan["phases"], usual["phases"]["image"]["held"]
  assert phases["denoise"] == usual["phases"]["denoise"]
  for name in ("image", "condition"):
    expected = usual["phases"][name]
    assert phases[name] == expected | {"held": expected["held"] - held}
  params = parts.space.variables["params"]
  assert plan["weights"] == {
    "transformer": leaves(parts.transformer.variables),
    "autoencoder": leaves(params["decoder"]),
    "text encoder, before the others": leaves(parts.texts.encoder.variables),
    "image encoder, before the others": leaves(parts.image_encoder.variables),
    "autoencoder, to encode, before the others": leaves(params["encoder"]),
  }
  weights = [*plan["weights"].values()]
  used = {n: x["bytes"] + x["held"] for n, x in phases.items()}
  assert plan["peak"] == max(
    sum(weights[:2]) + max(used["denoise"], used["decode"]),
    weights[2] + used["text"],
    sum(weights[3:]) + max(used["image"], used["condition"]),
  )
  # Each group has the whole device: the transformer leaves encoding no room.
  tight = sum(weights[:2]) + used["decode"]
  with pytest.raises(compiled.TooLarge, match="alone take|the condition"):
    measure(parts, tight - 2**20)
  again = measure(parts, tight, text_encoder="once")
  assert again["phases"]["condition"]["plan"]["cut"] is None


def test_a_memory_budget_is_the_pipelines():
  parts, usual = load("t2v").parts, found("t2v")["phases"]["decode"]
  budget = usual["plan"]["bytes"] - 1
  assert measure(parts, memory_budget=budget + 1)["phases"]["decode"] == usual
  tight = measure(parts, memory_budget=budget)["phases"]["decode"]["plan"]
  assert tight["cut"] is not None and tight["bytes"] <= budget


def test_guidance_in_turn_is_the_same_work(monkeypatch):
  together, plain = found("t2v"), found("t2v", guided=False)
  monkeypatch.setattr(denoise, "_BATCHED_TOKENS", 0)
  in_turn = measure(load("t2v").parts)
  steps = [plan["step"] for plan in (together, in_turn, plain)]
  assert [step["passes"] for step in steps] == [1, 2, 1]
  work = [step["flops"] for step in steps]
  assert work[0] == work[1] == pytest.approx(2 * work[2], rel=1e-3)
  # One branch after the other reads the weights twice.
  moved = steps[1]["traffic"] - steps[0]["traffic"]
  assert moved > 0.5 * together["weights"]["transformer"]
  seconds = together["seconds"]
  assert seconds["compute"] == steps[0]["flops"] / 1e9
  assert seconds["memory"] == steps[0]["traffic"] / 2e9
  assert seconds["total"] == max(seconds["compute"], seconds["memory"])


def test_decoding_is_planned_with_what_the_weights_leave():
  parts, plan = load("t2v").parts, found("t2v")
  module, phase = parts.space.module, plan["phases"]["decode"]
  assert phase["plan"]["cut"] is None
  assert phase["flops"] == bands.work(module, *SIZE[1:], decode=True)
  assert phase["runs"] == -(-SIZE.frames // module.chunk_frames)
  weights = sum(plan["weights"].values())
  left = phase["bytes"]
  tight = measure(parts, weights + left)["phases"]["decode"]["plan"]
  assert tight["cut"] is not None
  assert tight["bytes"] < memory.SHARE * left < phase["plan"]["bytes"]
  with pytest.raises(compiled.TooLarge, match="decoding: 64x64 does"):
    measure(parts, weights + 400_000)
  with pytest.raises(compiled.TooLarge, match="weights alone"):
    measure(parts, weights)


@pytest.mark.parametrize("variant", ["dc-wan2.1-i2v-14b", "wan2.1-t2v-1.3b"])
def test_parts_are_the_published_ones(variant):
  parts = sampling.parts(variant, jnp.bfloat16)
  pipeline.DCVideoGen(parts)  # Refuses an autoencoder that does not fit.
  deep = variant.startswith("dc-")
  assert isinstance(
    parts.space, spaces.DCAEVLatents if deep else spaces.WanVAELatents
  )
  assert parts.task == ("i2v" if deep else "t2v")
  assert (parts.image_encoder is None) == (parts.task == "t2v")
  params = parts.transformer.variables["params"]
  assert params["blocks"]["ffn"]["linear_1"]["kernel"].dtype == jnp.bfloat16
  assert params["blocks"]["modulation"].dtype == jnp.float32
  stored = 2 if deep else 4
  weights = sampling.weights(parts)
  assert weights["autoencoder"] == stored * sum(
    x.size for x in jax.tree.leaves(parts.space.variables)
  )


def test_parts_in_eight_bits_and_the_decoder_alone():
  variant = "dc-wan2.1-t2v-14b"
  parts = sampling.parts(variant, jnp.bfloat16, "int8")
  plain = sampling.parts(variant, jnp.bfloat16, "bfloat16")
  assert parts.space.variables["params"].keys() == {"decoder"}
  kernel = parts.transformer.variables["params"]["blocks"]["ffn"]["linear_1"]
  assert kernel["kernel"].dtype == jnp.int8
  found, expected = sampling.weights(parts), sampling.weights(plain)
  assert found["autoencoder"] == expected["autoencoder"]
  for name, share in (("transformer", 0.52), ("text encoder", 0.61)):
    assert 0.5 < found[name] / expected[name] < share


def test_parts_with_the_fast_decoder():
  variants = ("dc-wan2.1-t2v-14b", "dc-wan2.1-i2v-14b")
  t2v, i2v = (sampling.parts(x, jnp.bfloat16, fast=True) for x in variants)
  decoder = t2v.space.decoder(jnp.bfloat16)
  assert decoder.widths == dc_ae_v.FAST["f32t4c32"]["widths"]
  assert t2v.space.module.widths == dc_ae_v.VARIANTS["f32t4c32"]["widths"]
  parts = t2v.space.variables["params"], i2v.space.variables["params"]
  assert [{*x} for x in parts] == [{"decoder"}, {"encoder", "decoder"}]
  shapes = [tree.shapes(x["decoder"]) for x in parts]
  assert shapes[0] == shapes[1]
  assert shapes[0]["norm_out/scale"] == (decoder.widths[1],)
  with pytest.raises(errors.UserError, match="a fast decoder, found wan2.1"):
    sampling.parts("wan2.1-t2v-1.3b", jnp.bfloat16, fast=True)


def test_wans_autoencoder_and_two_images():
  tiny = load("i2v").parts
  module = tiny.transformer.module.clone(
    in_channels=36, out_channels=16, patch=(1, 2, 2), image_positions=34
  )
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), *convert.KINDS["wan_dit"].example(module)
  )
  space = spaces.WanVAELatents(
    *compiled.part(
      "wan_vae",
      "wan2.1",
      base_width=4,
      multipliers=(1, 1, 1),
      temporal=(True, True),
      blocks=1,
    )
  )
  parts = tiny._replace(
    transformer=loading.LoadedModel(module, shapes), space=space
  )
  plan = measure(parts)
  assert plan["latents"] == (11, 12, 16, 16)
  phases = plan["phases"]
  for name in ("condition", "decode"):
    runs = {k: row["runs"] for k, row in phases[name]["programs"].items()}
    assert runs == {"first": 1, "next": 10}
  side = parts.image_encoder.module.image_size
  pixels = phases["image"]["programs"]["encode"]["arguments"]
  assert pixels == 2 * side * side * 3 * 4


def test_devices_share_the_work(monkeypatch):
  monkeypatch.setattr(roofline, "rate", lambda *_: 1e9)
  parts, alone = load("t2v").parts, found("t2v")
  rules = config_parts.sample_sharding("fsdp", "context")
  shared = measure(parts, mesh=common.mesh(data=2, context=2), rules=rules)
  work = [plan["step"]["flops"] for plan in (alone, shared)]
  assert work[1] == pytest.approx(work[0] / 4, rel=0.1)
  assert shared["step"]["collectives"] and not alone["step"]["collectives"]
  # As many bytes as a device holds once the pipeline has loaded its parts.
  layout = placement.layout(common.mesh(data=2, context=2), rules)
  placed = pipeline.DCVideoGen.from_pretrained(
    TINY, task="t2v", layout=layout
  ).parts
  for name, part in (
    ("autoencoder", placed.space),
    ("transformer", placed.transformer),
    ("text encoder", placed.texts.encoder),
  ):
    held = [
      x.addressable_shards[0].data.nbytes
      for x in jax.tree.leaves(part.variables)
    ]
    assert shared["weights"][name] == sum(held)
  weights = [plan["weights"] for plan in (alone, shared)]
  assert weights[1]["autoencoder"] == weights[0]["autoencoder"]
  assert weights[1]["transformer"] < 0.6 * weights[0]["transformer"]
  assert weights[1]["text encoder"] < 0.3 * weights[0]["text encoder"]
  assert shared["latents"] == alone["latents"]


@pytest.mark.parametrize(
  ("arg", "expected"),
  [
    ("dc-t2v-14b,size=720p", sizes.Size(80, 720, 1280)),
    ("wan-i2v-14b", sizes.Size(81, 720, 1280)),
  ],
)
def test_sizes_of_configs(arg, expected):
  assert sampling.size(sample.get_config(arg)) == expected


def test_a_config_that_names_no_transformer():
  with pytest.raises(errors.UserError, match="needs config.variant"):
    sampling.measure_config(sample.get_config("tiny"), None)


@pytest.mark.parametrize(
  ("scale", "guided"), [(0.0, True), (0.5, True), (1.0, False), (5.0, True)]
)
def test_guidance_counts_as_it_does_in_sampling(monkeypatch, scale, guided):
  planned, taken = [], []
  monkeypatch.setattr(sampling, "parts", lambda *_, **__: None)
  monkeypatch.setattr(
    sampling, "measure", lambda *_, guided, **__: planned.append(guided)
  )
  config = sample.get_config("dc-t2v-1.3b")
  config.guidance_scale = scale
  sampling.measure_config(config, None)

  class Enough(Exception):
    """Raised in place of the first step."""

  def run(transformer, noise, plan, scale, cond, uncond, **options):
    taken.append(uncond is not None)
    raise Enough

  monkeypatch.setattr(denoise, "run", run)
  with pytest.raises(Enough):
    load("t2v").generate("rain", frames=8, guidance_scale=scale)
  assert planned == taken == [guided]


def test_a_guidance_scale_that_is_no_number(monkeypatch):
  monkeypatch.setattr(sampling, "parts", lambda *_, **__: None)
  config = sample.get_config("dc-t2v-1.3b")
  config.guidance_scale = float("nan")
  with pytest.raises(errors.UserError, match="finite number, found nan"):
    sampling.measure_config(config, None)
