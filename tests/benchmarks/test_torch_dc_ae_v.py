"""The PyTorch peer against DC-Gen commit cae2205."""

import numpy as np
import pytest

from tests import golden_data

pytestmark = pytest.mark.parity


def _peer(name):
  import torch

  from benchmarks import torch_dc_ae_v

  weights = {
    key: torch.from_numpy(x)
    for key, x in golden_data.weights("dc_ae_v", name).items()
  }
  return torch_dc_ae_v.Peer(weights, golden_data.DC_AE_V[name])


def _first(x):
  """To PyTorch's layout."""
  import torch

  return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def _last(x):
  return np.moveaxis(x.numpy(), 1, -1)


@pytest.mark.parametrize(
  ("name", "case", "frames"),
  [("f32t4_chunk8", "tile_T24", 24), ("f64t4_chunk8", "tile_T16", 16)],
)
def test_equals_the_reference(name, case, frames):
  golden = golden_data.io("dc_ae_v", name)
  peer = _peer(name)
  x = golden["in.x"][:, :frames]
  z = peer.encode(_first(np.concatenate([-x, x])))
  want = golden[f"out.{case}.z"]
  np.testing.assert_allclose(_last(z)[1:], want, rtol=0, atol=2e-5)
  y = _last(peer.decode(z))[1:, ..., ::3, ::3, :]
  want = golden[f"out.{case}.y@s3"]
  np.testing.assert_allclose(y, want, rtol=0, atol=2e-5)
