"""FVD: I3D and its input equal PyTorch's; the distance equals the formula."""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from dcvideogen_jax import errors
from dcvideogen_jax.convert import array_pickles, engine, pickled, sources
from dcvideogen_jax.convert import i3d as table
from dcvideogen_jax.eval import batches, fvd
from dcvideogen_jax.models import i3d

DIVISOR, CLASSES = 16, 7


@pytest.fixture(scope="module")
def oracle():
  """A narrow I3D in PyTorch with random weights and statistics."""
  torch = pytest.importorskip("torch")
  from tests.eval import torch_i3d

  torch.manual_seed(0)
  model = torch_i3d.I3D(CLASSES, DIVISOR).eval()
  for name, x in model.state_dict().items():
    if "running_var" in name or "bn.weight" in name:
      x.copy_(torch.rand_like(x) + 0.5)
    elif "running_mean" in name or "bias" in name:
      x.copy_(torch.randn_like(x) * 0.1)
    elif "conv3d.weight" in name:  # Keeps the size of activations.
      x.mul_(6**0.5)
  return model


@pytest.fixture(scope="module")
def shapes():
  module = i3d.I3D(CLASSES, DIVISOR)
  example = jax.ShapeDtypeStruct((1, 9, 224, 224, 3), jnp.float32)
  return module, jax.eval_shape(module.init, jax.random.key(0), example)


@pytest.fixture(scope="module")
def network(oracle, shapes):
  module, expected = shapes
  tensors = {
    name: x.numpy()
    for name, x in oracle.state_dict().items()
    if "num_batches" not in name
  }
  return module, {"params": _filled("pytorch", tensors, expected)}


def _filled(layout, arrays, expected):
  return engine.torch_to_jax(
    table.LAYOUTS[layout],
    sources.open_source(arrays),
    expected["params"],
    "the test",
  )


@pytest.mark.parity
def test_logits_are_those_of_torch(oracle, network):
  """The three frames that are left at the end make two windows."""
  import torch

  x = np.random.default_rng(1).uniform(-1, 1, (2, 20, 224, 224, 3))
  x = x.astype(np.float32)
  x[1] *= 0.3
  with torch.no_grad():
    expected = oracle(torch.tensor(x).permute(0, 4, 1, 2, 3)).numpy()
  module, variables = network
  logits = jax.jit(module.apply)(variables, x)
  scale = np.abs(expected[1] - expected[0]).max()
  assert scale > 0.05 * np.abs(expected).max()
  np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-4)


def _official(clip):
  """The input of the official code: clip `t h w 3` to `3 t 224 224`."""
  import torch

  x = torch.tensor(clip).permute(0, 3, 1, 2) / 255
  h, w = clip.shape[1:3]
  scale = 224 / min(h, w)
  if h < w:
    target = (224, math.ceil(w * scale))
  else:
    target = (math.ceil(h * scale), 224)
  x = torch.nn.functional.interpolate(
    x, size=target, mode="bilinear", align_corners=False
  )
  top, left = (target[0] - 224) // 2, (target[1] - 224) // 2
  x = (x[:, :, top : top + 224, left : left + 224] - 0.5) * 2
  return x.permute(1, 0, 2, 3)


@pytest.mark.parity
@pytest.mark.parametrize(
  "size", [(224, 224), (120, 161), (300, 256), (100, 200), (448, 336)]
)
def test_input_is_that_of_the_official_code(size):
  """Enlarged and reduced; at 100x200 the official width is 449."""
  clip = np.random.default_rng(2).integers(0, 256, (2, *size, 3), np.uint8)
  found = jax.jit(fvd.preprocess)(clip[None])[0]
  expected = _official(clip).permute(1, 2, 3, 0)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parity
def test_features_of_clips_over_devices(oracle, network):
  """Three clips on two devices, whose odd length is padded otherwise."""
  import torch

  module, variables = network
  clips = np.random.default_rng(3).integers(0, 256, (3, 9, 20, 24, 3), np.uint8)
  clips[1] //= 3
  with torch.no_grad():
    expected = oracle(torch.stack([*map(_official, clips)])).numpy()
  spread = batches.replicated(variables, jax.devices()[:2])
  found = fvd.features(module, spread, [*clips])
  scale = np.abs(expected[1] - expected[0]).max()
  assert found.dtype == np.float64 and scale > 0.05 * np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["hassony", "flax"])
def test_other_layouts(network, shapes, layout):
  rules = table.LAYOUTS[layout]
  _, variables = network
  arrays = {
    name: x.read()
    for name, x in engine.torch_tensors(rules, variables["params"]).items()
  }
  names = {
    "hassony": "mixed_4c.branch_2.1.batch3d.running_mean",
    "flax": "batch_stats/Mixed_4c/Branch_2/Conv3d_0b_3x3/BatchNorm_0/mean",
  }
  assert arrays[names[layout]].ndim == {"hassony": 1, "flax": 5}[layout]
  found = _filled(layout, arrays, shapes[1])
  assert jax.tree.all(jax.tree.map(np.array_equal, found, variables["params"]))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch recommends newer formats.
def test_a_torchscript_archive_is_read(tmp_path, oracle):
  import torch

  path = tmp_path / "i3d.pt"
  block = oracle.Mixed_3b
  x = torch.zeros(1, 192 // DIVISOR, 2, 4, 4)
  torch.jit.trace(block, x, check_trace=False).save(path)
  tensors = pickled.open_torch(path)
  state = block.state_dict()
  assert state.keys() == tensors.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(tensors[name].read(), x.numpy())


class Attack:
  def __reduce__(self):
    return print, ("run",)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"a": Attack()}, "asks for builtins.print"),
    ({"a": np.array([None])}, "array of O8"),
    ({"a": 1.0}, "holds a float"),
    ({1: np.ones(2)}, "a key 1"),
  ],
)
def test_pickles_hold_arrays_only(tmp_path, capsys, content, message):
  path = tmp_path / "weights.ckpt"
  path.write_bytes(pickle.dumps(content, protocol=4))
  with pytest.raises(errors.UserError, match=message):
    array_pickles.open_arrays(path)
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_of_pickles(tmp_path, protocol):
  random = np.random.default_rng(0)
  x = {
    "c": random.normal(size=(3, 4)).astype(np.float32),
    "f": np.asfortranarray(random.normal(size=(3, 4))),
    "big": random.integers(0, 9, 5).astype(">i4"),
  }
  path = tmp_path / "weights.ckpt"
  path.write_bytes(pickle.dumps({"a": x}, protocol=protocol))
  found = array_pickles.open_arrays(path)
  assert found.keys() == {"a/c", "a/f", "a/big"}
  for name, value in x.items():
    np.testing.assert_array_equal(found[f"a/{name}"], value)


# --- the distance ------------------------------------------------------------


def formula(a, b):
  """The official code's, in float64."""
  means = np.square(a.mean(0) - b.mean(0)).sum()
  first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  root = scipy.linalg.sqrtm(first @ second)
  return means + np.trace(first) + np.trace(second) - 2 * np.trace(root).real


def samples(n, width, seed):
  random = np.random.default_rng(seed)
  mixing = random.normal(size=(width, width))
  return random.normal(size=(n, width)) @ mixing + random.normal(size=width)


def test_distance_is_the_formula():
  a, b = samples(300, 24, 0), samples(200, 24, 1)
  found = fvd.distance(fvd.Moments.of(a), fvd.Moments.of(b))
  assert found == pytest.approx(formula(a, b), rel=1e-9)


def test_singular_covariances_of_few_clips():
  """The samples are in a space of ten axes, where the formula is exact."""
  small = samples(300, 10, 2), samples(200, 10, 3)
  frame = np.linalg.qr(samples(60, 60, 4))[0][:, :10]
  moments = [fvd.Moments.of(x @ frame.T) for x in small]
  assert np.linalg.matrix_rank(moments[0].covariance) == 10
  assert fvd.distance(*moments) == pytest.approx(formula(*small), rel=1e-9)
  few = fvd.Moments.of(samples(5, 60, 5))
  scale = np.trace(few.covariance)
  assert abs(fvd.distance(few, few)) < 1e-12 * scale


def test_moments_merge_in_any_order():
  """Far from zero, where sums of squares would have lost all digits."""
  x = samples(40, 6, 6) + 1e8
  whole = fvd.Moments.of(x)
  parts = [fvd.Moments.of(x[i:j]) for i, j in ((0, 1), (1, 17), (17, 40))]
  empty = fvd.Moments.empty(6)
  for order in ((0, 1, 2), (2, 0, 1)):
    merged = empty
    for i in order:
      merged = merged.merge(parts[i])
    assert merged.count == 40
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(
      merged.covariance, np.cov(x, rowvar=False), rtol=1e-5
    )
  assert empty.merge(empty).count == 0


def test_moments_of_processes_are_merged(monkeypatch):
  x = samples(12, 5, 7)
  parts = [fvd.Moments.of(x[:4]), fvd.Moments.of(x[4:])]
  assert fvd.gather(parts[0]) is parts[0]
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  sent = []
  monkeypatch.setattr(fvd.multihost_utils, "process_allgather", sent.append)
  for part in parts:
    with pytest.raises(TypeError):  # Nothing has been received.
      fvd.gather(part)
  assert all(bits.dtype == np.uint32 for bits in sent)
  monkeypatch.setattr(
    fvd.multihost_utils, "process_allgather", lambda _: jnp.stack(sent)
  )
  merged, whole = fvd.gather(parts[0]), fvd.Moments.of(x)
  assert merged.count == 12
  np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
  np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-12)


def test_files_of_statistics(tmp_path):
  x = samples(9, 4, 8)
  moments = fvd.Moments.of(x)
  moments.save(tmp_path / "ours.npz")
  again = fvd.Moments.load(tmp_path / "ours.npz")
  assert again.count == 9 and isinstance(again.count, int)
  np.testing.assert_array_equal(again.scatter, moments.scatter)
  reference = fvd.reference(tmp_path / "ours.npz")
  assert reference.count == 9
  official = tmp_path / "official.npz"
  np.savez(official, mu=x.mean(0), sigma=np.cov(x, rowvar=False))
  stored = fvd.reference(official)
  assert stored.count is None
  other = fvd.Moments.of(samples(9, 4, 9))
  assert fvd.distance(other, stored) == pytest.approx(
    fvd.distance(other, moments), rel=1e-9
  )
  with pytest.raises(errors.UserError, match="expected count, mean, scatter"):
    fvd.Moments.load(official)
  np.savez(official, mu=x.mean(0), sigma=np.ones((4, 3)))
  with pytest.raises(errors.UserError, match="do not fit"):
    fvd.reference(official)
  official.write_bytes(b"nothing")
  with pytest.raises(errors.UserError, match="holds no statistics"):
    fvd.reference(official)
  with pytest.raises(errors.UserError, match="cannot read"):
    fvd.reference(tmp_path / "none.npz")


def test_windows_do_not_overlap():
  clip = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1).repeat(3, -1)
  found = fvd.windows(clip, 16)
  assert [(w[0, 0, 0, 0], len(w)) for w in found] == [(0, 16), (16, 16)]
  assert [len(w) for w in fvd.windows(clip)] == [40]
  with pytest.raises(errors.UserError, match="do not fit a clip of 40"):
    fvd.windows(clip, 41)
  with pytest.raises(errors.UserError, match="at least 9 frames"):
    fvd.windows(clip, 8)


def test_what_has_no_distance(shapes):
  one = fvd.Moments.of(samples(1, 4, 0))
  two = fvd.Moments.of(samples(2, 4, 0))
  with pytest.raises(errors.UserError, match="two clips on each side, found 1"):
    fvd.distance(two, one)
  with pytest.raises(errors.UserError, match="found 4 and 5"):
    fvd.distance(two, fvd.Moments.of(samples(2, 5, 0)))
  module, expected = shapes
  variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), expected)
  clips = [np.zeros((t, 8, 8, 3), np.uint8) for t in (9, 10)]
  with pytest.raises(errors.UserError, match="one shape at a time"):
    fvd.features(module, variables, clips)
  with pytest.raises(errors.UserError, match="at least 9 frames"):
    fvd.features(module, variables, [clips[0][:8]])
