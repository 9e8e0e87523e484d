"""What fits is what was compiled: the figures are those of docs/planning.md."""

import json
import subprocess
import sys

import pytest

from dcvideogen_jax.plan import fits, hardware, tables
from tests.launch import launching

GIB = 2**30
ONCE, EIGHT = "--text_encoder=once", "--config.weights=int8"
DEVICES = ("rtx4090", "rtx5090", "l40s", "h100")
# In a process of its own, as checks of shapes take longer than the estimates.
ESTIMATE = f"""
import json
from dcvideogen_jax.plan import fits, formulas, machine, sampling
from dcvideogen_jax.sample import presets
rows = {{n: [*fits.rows(machine.target(n))] for n in {DEVICES}}}
steps = {{}}
for row in rows["h100"]:
  c = presets.get_config(row.config)
  parts = sampling.parts(c.variant, "bfloat16", None, fits._part)
  found = formulas.needs(parts, sampling.size(c), platform="gpu")
  steps[row.config] = found.step_bytes
print(json.dumps([rows, steps]))
"""


@pytest.fixture(scope="module")
def estimated():
  """Rows by device and config, and bytes of a step by config."""
  told = subprocess.run(
    [sys.executable, "-c", ESTIMATE],
    cwd=launching.ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  found, steps = json.loads(told)
  by_device = {}
  for name, listed in found.items():
    rows = [
      fits.Row(c, None if how is None else tuple(how), *rest)
      for c, how, *rest in listed
    ]
    by_device[name] = {row.config: row for row in rows}
  return by_device, steps


@pytest.fixture
def row(estimated):
  return lambda device, config: estimated[0][device][config]


@pytest.mark.parametrize(
  ("device", "config", "flags"),
  [
    ("rtx4090", "dc-t2v-1.3b,size=480p", ()),
    ("rtx4090", "dc-t2v-14b,size=480p", (ONCE, EIGHT)),
    ("rtx4090", "dc-t2v-14b,size=1080p", (ONCE, EIGHT)),
    ("rtx4090", "dc-t2v-14b,size=2160p", None),
    ("rtx4090", "dc-i2v-14b,size=480p", (ONCE, EIGHT)),
    ("rtx4090", "dc-i2v-14b,size=720p", (ONCE, EIGHT)),
    ("rtx4090", "dc-i2v-14b,size=1080p", None),
    ("rtx5090", "dc-t2v-14b,size=2160p", (ONCE, EIGHT)),
    ("rtx5090", "dc-i2v-14b,size=480p", (ONCE, EIGHT)),
    ("rtx5090", "dc-i2v-14b,size=720p", (ONCE, EIGHT)),
    ("rtx5090", "dc-i2v-14b,size=2160p", (ONCE, EIGHT)),
    ("l40s", "dc-i2v-14b,size=720p", (ONCE,)),
    ("h100", "dc-t2v-14b,size=2160p", ()),
    ("h100", "dc-i2v-14b,size=2160p", ()),
  ],
)
def test_what_was_compiled_fits_in_the_same_way(row, device, config, flags):
  found = row(device, config)
  assert found.flags == flags
  limit = hardware.GPUS[device].usable
  assert (found.bytes <= limit) == (flags is not None)


@pytest.mark.parametrize(
  ("config", "seconds"),
  [
    ("dc-t2v-1.3b,size=480p", 0.06),
    ("dc-t2v-1.3b,size=2160p", 11),
    ("dc-t2v-14b,size=480p", 0.5),
    ("dc-t2v-14b,size=1080p", 4.8),
    ("dc-t2v-14b,size=2160p", 52),
    ("dc-i2v-14b,size=2160p", 52),
  ],
)
def test_a_step_takes_as_long_as_the_plan_says(row, config, seconds):
  found = row("h100", config).step_seconds
  assert found == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(
  ("config", "gib"),
  [
    ("dc-t2v-14b,size=480p", 1.1),
    ("dc-t2v-14b,size=1080p", 2.9),
    ("dc-t2v-14b,size=2160p", 8.0),
    ("dc-i2v-14b,size=480p", 1.0),
    ("dc-i2v-14b,size=2160p", 9.6),  # 8.0 since, like T2V's.
  ],
)
def test_a_step_takes_about_the_memory_that_was_compiled(
  estimated, config, gib
):
  assert 0.8 < estimated[1][config] / (gib * GIB) < 1.3


def test_encoders_that_go_do_not_count_beside_the_others(row):
  """I2V of 480p was compiled in 21.3 GiB, 17.8 of them weights."""
  found = row("rtx4090", "dc-i2v-14b,size=480p").bytes / GIB
  assert 17.8 + 1.1 < found < 21.4


def test_rows_as_lines(row):
  slow = row("h100", "dc-t2v-14b,size=2160p")
  assert tables.fitting(slow) == (
    "  dc-t2v-14b,size=2160p     163200 tokens    48.3 GiB  fits  50 steps in"
    " 43 min or more"
  )
  needy = row("rtx4090", "dc-t2v-1.3b,size=2160p")
  assert tables.fitting(needy).endswith(f"54 min or more  {ONCE}")
  none = row("rtx4090", "dc-t2v-14b,size=2160p")
  assert tables.fitting(none).endswith("24.6 GiB  does not fit")


def test_a_device_without_known_rates_has_no_times(row):
  device = fits.Device("gpu", hardware.GPUS["h100"].usable)
  assert fits.step_seconds(device, 10**15, 10**9) is None
  found = row("h100", "dc-t2v-14b,size=480p")._replace(step_seconds=None)
  assert tables.fitting(found).endswith("fits")
  assert fits.Device("cpu", 1).dtype == "float32"


def test_a_step_that_waits_for_the_weights():
  device = fits.Device("gpu", 1, {"bfloat16": 1e15}, 1e12)
  assert fits.step_seconds(device, 10**12, 10**9) == 1e-3
  assert fits.step_seconds(device, 10**13, 10**9) == 1e-2
