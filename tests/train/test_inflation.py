"""DC-AE-V starts from an image DC-AE, or from itself with other latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors, levels, tree
from dcvideogen_jax.models import dc_ae_v
from dcvideogen_jax.train import inflation, step
from tests import random_weights

IMAGE = {
  "latent_channels": 4,
  "encoder_block_out_channels": (8, 8, 16),
  "decoder_block_out_channels": (8, 8, 16),
  "encoder_layers_per_block": (0, 2, 1),
  "decoder_layers_per_block": (0, 1, 2),
  "encoder_qkv_multiscales": ((), (), ()),
  "decoder_qkv_multiscales": ((), (), ()),
  "decoder_conv_act_fn": "silu",
  "scaling_factor": 1.0,
}
MODEL = {
  "latent_channels": 4,
  "widths": (8, 8, 16, 16),
  "depths": (0, 2, 2, 1),
  "chunk_frames": 4,
  "spatial_factor": 4,
  "temporal_factor": 2,
}


@pytest.fixture(scope="module")
def image_model():
  import diffusers
  import torch

  torch.manual_seed(0)
  model = diffusers.AutoencoderDC(**IMAGE).eval()
  with torch.no_grad():
    for value in model.parameters():
      value.normal_(std=0.3 if value.ndim == 1 else value[0].numel() ** -0.5)
  return model


def _params(module):
  size = module.spatial_factor
  example = jnp.zeros((1, module.temporal_factor, size, size, 3))
  shapes = jax.eval_shape(module.init, jax.random.key(0), example)
  return random_weights.like(shapes, norms=1.0)["params"]


def _started(image_model, taps="centre", **changes):
  module = dc_ae_v.build(MODEL | changes)
  params = _params(module)
  leaves = tree.flatten(params)
  # As `init` gives them.
  zeros = {n: 0 * x for n, x in leaves.items() if n.endswith("bias")}
  params = jax.tree.unflatten(
    jax.tree.structure(params), (leaves | zeros).values()
  )
  state = {n: x.numpy() for n, x in image_model.state_dict().items()}
  return module, *inflation.from_images(state, module, params, taps)


@pytest.mark.parity
def test_a_still_video_is_the_image_models_output(image_model):
  """In every frame, over two chunks; the depths differ in both halves."""
  import torch

  module, params, rows = _started(image_model)
  image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 8, 3)).astype("f4")
  with torch.no_grad():
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2)
    latents = image_model.encode(pixels).latent
    expected = image_model.decode(latents).sample.permute(0, 2, 3, 1).numpy()
  video = np.repeat(image[:, None], 8, axis=1)
  found = random_weights.jitted(module, "encode")({"params": params}, video)
  latents = latents.permute(0, 2, 3, 1).numpy()
  assert np.abs(latents).max() > 0.3
  for frame in np.moveaxis(np.asarray(found), 1, 0):
    np.testing.assert_allclose(frame, latents, atol=1e-4)
  output = random_weights.jitted(module)({"params": params}, video)
  for frame in np.moveaxis(np.asarray(output), 1, 0):
    np.testing.assert_allclose(frame, expected, atol=1e-4)
  # Every tensor of the image model is used.
  used = {row.origin for row in rows if row.origin}
  assert used == {*image_model.state_dict()}


@pytest.mark.parity
def test_spread_taps_are_the_same_inside_a_chunk(image_model):
  centre, spread = (
    tree.flatten(_started(image_model, taps)[1]) for taps in inflation.TAPS
  )
  kernel = "encoder/stages_1/op_list_0/conv1/kernel"
  assert np.abs(centre[kernel][1]).max() > 0
  assert np.abs(centre[kernel][::2]).max() == 0
  np.testing.assert_allclose(
    spread[kernel].sum(0), centre[kernel][1], rtol=1e-6
  )
  np.testing.assert_array_equal(spread[kernel][0], spread[kernel][2])


@pytest.mark.parity
def test_the_table_says_what_is_new(image_model):
  _, _, rows = _started(image_model)
  lines = inflation.table(rows).splitlines()
  for line in (
    "| encoder/stages_2/op_list_0 | encoder.down_blocks.2.0.conv1, "
    "encoder.down_blocks.2.0.conv2, encoder.down_blocks.2.0.norm |",
    "| encoder/stages_2/op_list_1 | new |",
    "| encoder/stages_2/op_list_2 | new |",
    "| encoder/stages_3/op_list_0 | new |",
    "| decoder/stages_2/op_list_0 | new |",
    "| decoder/stages_1/op_list_0 | decoder.up_blocks.1.0.conv |",
    "| decoder/stages_1/op_list_2 | new |",
  ):
    assert line in lines, line


@pytest.mark.parity
def test_blocks_of_another_type_are_new(image_model):
  state = {n: x.numpy() for n, x in image_model.state_dict().items()}
  state["decoder.up_blocks.1.1.norm.running_mean"] = np.zeros(8, "f4")
  module = dc_ae_v.build(MODEL)
  _, rows = inflation.from_images(state, module, _params(module), "centre")
  origins = dict(rows)
  block = "decoder/stages_1/op_list_1"
  assert origins[f"{block}/conv2/norm/scale"] is None
  assert origins[f"{block}/conv1/kernel"] is not None


@pytest.mark.parametrize(
  ("state", "message"),
  [
    ({"a": np.zeros(3)}, "holds no AutoencoderDC of diffusers"),
    (
      {"encoder.conv_out.weight": np.zeros((4, 24, 3, 3), "f4")},
      "no layer of the mapping fits the model's widths",
    ),
  ],
)
def test_weights_that_do_not_fit(state, message):
  module = dc_ae_v.build(MODEL)
  with pytest.raises(errors.UserError, match=message):
    inflation.from_images(state, module, _params(module), "centre")


@pytest.mark.parametrize("channels", [2, 6])
def test_other_latents_start_from_the_first_channels(
  channels, tmp_path, capsys
):
  old = dc_ae_v.build(MODEL)
  params = _params(old)
  convert.save(tmp_path / "model", "dc_ae_v", old, {"params": params})
  task = step.build_task(
    {
      "task": "autoencoder",
      "model": MODEL | {"latent_channels": channels, "chunk_frames": 8},
      "loss": {"l1": 1.0},
      "start": "other_latents",
      "weights": str(tmp_path / "model"),
    }
  )
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  found = task.start(jax.tree.map(lambda x: here, shapes))
  # The table that a start prints.
  line = "| encoder/project_out | encoder/project_out |"
  assert line in capsys.readouterr().out
  video = levels.to_float(
    np.random.default_rng(0).integers(0, 256, (1, 8, 8, 8, 3), np.uint8)
  )
  new = dc_ae_v.build(MODEL | {"latent_channels": channels})
  latents = random_weights.jitted(new, "encode")({"params": found}, video)
  before = np.array(
    random_weights.jitted(old, "encode")({"params": params}, video)
  )
  kept = min(channels, 4)
  np.testing.assert_allclose(latents[..., :kept], before[..., :kept], atol=1e-5)
  output = random_weights.jitted(new, "decode")({"params": found}, latents)
  before[..., kept:] = 0
  expected = random_weights.jitted(old, "decode")({"params": params}, before)
  np.testing.assert_allclose(output, expected, atol=1e-4)


def test_another_model_than_its_own_is_refused(tmp_path):
  old = dc_ae_v.build(MODEL | {"widths": (8, 8, 8, 8)})
  convert.save(tmp_path / "model", "dc_ae_v", old, {"params": _params(old)})
  module = dc_ae_v.build(MODEL)
  with pytest.raises(errors.UserError, match="more than latent channels"):
    inflation.with_other_latents(
      str(tmp_path / "model"), module, _params(module)
    )
