"""The planned step is the one that trains, and its figures add up."""

import jax
import jax.numpy as jnp
import pytest

from configs import adapt, dc_ae_v, tiny
from dcvideogen_jax import errors, flops
from dcvideogen_jax.plan import (
  compiled,
  hardware,
  roofline,
  suggest,
  training,
)
from dcvideogen_jax.train import loop, step

LORA = "wan_t2v_14b,phase=lora,runlocal"
TARGET = hardware.Target("cpu", hardware.GPUS["h100"], tuple(jax.devices()))


@pytest.fixture(autouse=True)
def linked(monkeypatch):
  """Sets rates of links: devices of this machine have no coordinates."""
  monkeypatch.setattr(roofline, "rate", lambda *_: 1e9)
  monkeypatch.setattr(suggest, "_rate", lambda *_: 1e9)


def small(arg=LORA, **changes):
  config = adapt.get_config(arg).to_dict()
  config["model"] |= {"remat": "full", "text_width": 16}
  config["data"]["shapes"] |= {"text": (5, 16)}
  return config | {"mesh": {"fsdp": 4, "tensor": 2}} | changes


@pytest.fixture(scope="module")
def found():
  """Returns the plan of a small step."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(roofline, "rate", lambda *_: 1e9)
    return training.measure(small(), TARGET)


def test_it_is_the_step_that_trains(found):
  config = small()
  run = step.plan(config)
  state, frozen = step.init(run)
  data = loop.batches(run, config["data"], config["batch_size"], 0)
  batch = step.put(run.mesh, next(data))
  data.close()
  assert found["batch"] == {name: x.shape for name, x in batch.items()}
  with jax.set_mesh(run.mesh):
    trained = step.compile_step(run, config).lower(state, frozen, batch)
    shapes = training.batch(config)
    planned = step.trace(run, config, shapes).lower()
    assert planned.as_text() == trained.as_text()
  sizes = found["bytes"]
  local = {
    name: sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(part))
    for name, part in (
      ("parameters", state.params),
      ("optimiser", state.opt),
      ("average", state.ema),
      ("frozen", frozen),
    )
  }
  assert local == {name: sizes[name] for name in local}
  # "batch" includes a few numbers of the state, such as the step, and leaves
  # out arrays that the step does not read.
  used = (batch["deep"], batch["text"])
  batch = sum(x.addressable_data(0).nbytes for x in used)
  assert batch <= sizes["batch"] < batch + 100
  parts = ("batch", "outputs", "temporaries", "program")
  assert sizes["peak"] == sum(local.values()) + sum(sizes[k] for k in parts)
  assert found["parameters"]["trainable"] == sum(
    x.size for x in jax.tree.leaves(state.params)
  )


def test_time_is_the_largest_and_what_waits(found):
  seconds, chip = found["seconds"], TARGET.chip
  assert seconds["compute"] == found["flops"] / chip.flops["float32"]
  assert seconds["memory"] == found["traffic"] / chip.bandwidth
  rows = found["collectives"]
  assert rows and all(row["seconds"] == row["bytes"] / 1e9 for row in rows)
  waiting = sum(row["seconds"] for row in rows if not row["overlaps"])
  assert seconds["exposed"] == pytest.approx(waiting)
  longest = max(seconds[k] for k in ("compute", "memory", "overlapped"))
  assert seconds["total"] == longest + seconds["exposed"]
  assert found["utilisation"] == pytest.approx(
    found["useful_flops"] / chip.flops["float32"] / seconds["total"]
  )


def test_what_is_computed_again_is_of_no_use():
  work, useful = [], []
  for remat in ("full", None):
    config = training.planned(small())
    config["model"]["remat"] = remat
    config["model"]["attention"] = "reference"
    run = step.plan(config, TARGET.devices)
    traced = step.trace(run, config, training.batch(config))
    work.append(flops.count(traced.jaxpr.jaxpr))
    useful.append(step.model_flops(config, training.batch(config)))
  assert useful[0] == useful[1] == pytest.approx(work[1], rel=1e-6)
  # Rematerialisation repeats the products of all blocks. Frozen weights need no
  # gradients, so the backward pass costs little more than the forward pass.
  assert 1.3 < work[0] / work[1] < 1.5


def test_what_a_mask_hides_is_of_no_use():
  config = training.planned(small(f"{LORA},causal=teacher"))
  config["model"]["remat"] = None
  work = []
  for name in ("by_chunks", "reference"):
    config["model"]["attention"] = name
    run = step.plan(config, TARGET.devices)
    traced = step.trace(run, config, training.batch(config))
    work.append(flops.count(traced.jaxpr.jaxpr))
  useful = step.model_flops(config, training.batch(config))
  assert useful == pytest.approx(work[0], rel=1e-6) and useful < work[1]


@pytest.mark.parametrize(
  ("arg", "shapes"),
  [
    (
      "wan_t2v_14b,phase=lora",
      {"deep": (32, 20, 15, 26, 32), "text": (32, 512, 4096)},
    ),
    (
      "wan_i2v_14b,phase=head,target=v5p_4x4x4",
      {
        "deep": (64, 20, 15, 26, 32),
        "deep_condition": (64, 20, 15, 26, 32),
        "text": (64, 512, 4096),
        "image": (64, 257, 1280),
      },
    ),
    (
      "wan_t2v_1_3b,phase=embed",
      {"base": (4, 20, 60, 104, 16), "deep": (4, 20, 15, 26, 32)},
    ),
    ("tiny_t2v,phase=base", {"base": (8, 4, 8, 8, 16), "text": (8, 32, 64)}),
  ],
)
def test_batches(arg, shapes):
  found = training.batch(adapt.get_config(arg).to_dict())
  assert {name: x.shape for name, x in found.items()} == shapes
  assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
  "config",
  [
    dc_ae_v.get_config("f32t4c32,runlocal"),
    tiny.get_config("wan_autoencoder,runlocal"),
  ],
  ids=["dc_ae_v", "wan_vae"],
)
def test_batches_are_those_of_the_data(config):
  config.batch_size = 8
  config = config.to_dict()
  run = step.plan(training.planned(config))
  data = loop.batches(run, config["data"], config["batch_size"], 0)
  batch = next(data)
  data.close()
  assert training.batch(config) == {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()
  }


def test_what_cannot_be_planned():
  with pytest.raises(errors.UserError, match="leave out `raw`"):
    training.planned(adapt.get_config("wan_t2v_14b,phase=lora,raw").to_dict())
  config = adapt.get_config("wan_t2v_14b,phase=lora").to_dict()
  config["clips"]["width"] = 830
  with pytest.raises(errors.UserError, match="found 80 frames of 480x830"):
    training.batch(config)


def test_a_compiler_without_room(monkeypatch):
  class Traced:
    def lower(self):
      raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory.\nand a list"
      )

  with pytest.raises(compiled.TooLarge, match="^Ran out of memory.$"):
    compiled.compile_traced(Traced())


def test_ranking(monkeypatch):
  monkeypatch.setattr(suggest, "_rate", lambda *_: 1e15)
  config = small(batch_size=16)
  ways = suggest.rank(config, TARGET)
  assert [way.seconds for way in ways] == sorted(way.seconds for way in ways)
  by = {(*way.mesh.values(), way.remat, way.accumulate): way for way in ways}
  assert (4, 2, 1, "full", 1) in by and (4, 1, 2, "full", 1) in by
  # Four devices cannot share two heads, nor can eight devices share 16 clips in
  # four parts.
  assert not any(t * c > 2 for _, t, c, *_ in by)
  assert (8, 1, 1, "full", 2) in by and (8, 1, 1, "full", 4) not in by
  kept, again = by[8, 1, 1, None, 1], by[8, 1, 1, "full", 1]
  assert kept.seconds < again.seconds and kept.bytes > again.bytes
  assert by[8, 1, 1, "full", 2].bytes < again.bytes

  # Ways that do not fit come last, however fast they are.
  chip = hardware.dataclasses.replace(
    TARGET.chip, memory=int((kept.bytes + again.bytes) / 2 / hardware.FRACTION)
  )
  tight = suggest.rank(config, TARGET._replace(chip=chip))
  fits = [way.bytes <= chip.usable for way in tight]
  assert fits == sorted(fits, reverse=True) and {*fits} == {True, False}


def test_a_way_is_a_config_that_trains():
  config = small(batch_size=16)
  way = suggest.Way({"fsdp": 4, "context": 2}, "dots", 2, 0, 0)
  changed = training.planned(way.change(config))
  run = step.plan(changed, TARGET.devices)
  assert run.mesh.shape["context"] == 2
  step.trace(run, changed, training.batch(changed))
  assert changed["model"]["remat"] == "dots" and changed["accumulate"] == 2
  assert config["model"]["remat"] == "full" and config["accumulate"] == 1


def test_ranking_is_for_transformers():
  with pytest.raises(errors.UserError, match="for the task denoise"):
    suggest.rank(dc_ae_v.get_config().to_dict(), TARGET)
