"""Jobs that encode clips beforehand: several devices, parts, folders."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import clip_sources, parts
from dcvideogen_jax.precompute import encoders as encoders_lib
from dcvideogen_jax.precompute import encoding
from dcvideogen_jax.sample import layouts
from tests.launch import precomputing


def _job(base_vae, output, clips):
  options = encoders_lib.Options(
    frames=8,
    batch=2,
    i2v=False,
    stretch=False,
    budget=2**30,
    precision="highest",
    text_dtype="float32",
    text_tokens=16,
  )
  parts.begin(output, {})
  return encoding.Job(
    clip_sources.World(clips, "train", 0),
    layouts.Paths(wan_vae=base_vae[0]),
    options,
    bucket="32x32",
    per_part=2,
    dtype="float32",
    negative="",
    output=output,
    threads=2,
  )


def test_captions_that_are_cut_are_counted(base_vae, tmp_path):
  """Not the negative prompt, which is longer too."""
  job = _job(base_vae, tmp_path / "out", 2)
  job = job._replace(
    options=job.options._replace(text_tokens=3),
    negative="many words " * 9,
    paths=job.paths._replace(
      text_encoder=precomputing.TINY / "text_encoder",
      tokenizer=precomputing.TINY / "tokenizer",
    ),
  )
  with pytest.warns(UserWarning, match="^2 captions were cut to their first 3"):
    encoding.run(job, range(1))


def test_all_devices_encode(base_vae, tmp_path, monkeypatch):
  """Each its parts, all of them at once, to the same bytes as one."""
  whole = _job(base_vae, tmp_path / "whole", 11)
  one, *_ = devices = jax.local_devices()[:3]
  monkeypatch.setattr(jax, "local_devices", lambda: [one])
  counts = []
  encoding.run(whole, range(6), done=counts.append)
  assert sum(counts) == 11

  together = threading.Barrier(3, timeout=100)
  used = set()
  encode_clips = encoders_lib.Encoders.clips

  def clips(self, *arguments):
    (device,) = jnp.zeros(()).devices()
    if device not in used:
      used.add(device)
      together.wait()
    return encode_clips(self, *arguments)

  monkeypatch.setattr(encoders_lib.Encoders, "clips", clips)
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  spread = _job(base_vae, tmp_path / "spread", 11)
  counts.clear()
  encoding.run(spread, range(6), done=counts.append)
  assert sum(counts) == 11 and used == set(devices)
  assert precomputing.content(spread.output) == precomputing.content(
    whole.output
  )


def test_a_device_that_fails_ends_the_others(base_vae, tmp_path, monkeypatch):
  job = _job(base_vae, tmp_path / "out", 40)
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
  encode_clips = encoders_lib.Encoders.clips

  def clips(self, *arguments):
    if jnp.zeros(()).devices() == {jax.devices()[1]}:
      raise errors.UserError("no more")
    time.sleep(0.1)
    return encode_clips(self, *arguments)

  monkeypatch.setattr(encoders_lib.Encoders, "clips", clips)
  counts = []
  with pytest.raises(errors.UserError, match="no more"):
    encoding.run(job, range(20), done=counts.append)
  assert sum(counts) < 20
  whole = {path.name for path in job.output.glob("part-*")}
  assert len(whole) * job.per_part <= sum(counts)


def test_two_in_one_folder_share_the_parts(base_vae, tmp_path):
  """Each is made once: a part that the other makes is left to it."""
  whole = _job(base_vae, tmp_path / "whole", 4)
  encoding.run(whole, range(2))
  shared = _job(base_vae, tmp_path / "shared", 4)
  counts = []
  with parts.locked(shared.output, 0) as other:
    assert other
    encoding.run(shared, range(2), done=counts.append)
    assert [parts.is_done(shared.output, n) for n in range(2)] == [False, True]
  assert sum(counts) == 2
  assert parts.finish(shared.output, 2) is None
  encoding.run(shared, range(2), done=counts.append)
  assert sum(counts) == 4
  assert precomputing.content(shared.output) == precomputing.content(
    whole.output
  )
