"""Values that files may give to the fields of models, and refusals."""

import json

import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import matching
from tests.convert import checkpoints

SMALL = {
  "dc_ae_v": {
    "latent_channels": 4,
    "widths": (8, 8, 16, 32),
    "depths": (0, 1, 1, 1),
    "chunk_frames": 8,
    "spatial_factor": 4,
  },
  "wan_dit": checkpoints.T2V,
  "wan_vae": {
    "latent_channels": 2,
    "base_width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "temporal": (False,),
    "mean": (0.0, 0.5),
    "std": (1.0, 2),
  },
  "umt5": {
    "vocab": 40,
    "layers": 2,
    "width": 16,
    "heads": 2,
    "head_width": 8,
    "ffn_width": 24,
  },
  "clip_vision": {
    "image_size": 8,
    "patch": 4,
    "layers": 2,
    "width": 16,
    "heads": 2,
    "ffn_width": 24,
  },
}
# Fields that are positive whole numbers, and fields that are positive floats.
COUNTS = {
  "dc_ae_v": ["latent_channels", "chunk_frames", "spatial_factor", "widths.1"],
  "wan_dit": ["layers", "width", "heads", "text_width", "patch.0", "chunk"],
  "wan_vae": ["latent_channels", "base_width", "blocks", "multipliers.0"],
  "umt5": ["vocab", "layers", "head_width", "buckets", "max_distance"],
  "clip_vision": ["image_size", "patch", "layers", "heads", "ffn_width"],
}
NUMBERS = {
  "dc_ae_v": ["latent_scale"],
  "wan_dit": ["eps", "rope_scale.2"],
  "wan_vae": ["std.1"],
  "umt5": ["eps"],
  "clip_vision": ["eps"],
}
# JSON texts; Python's parser also accepts NaN and Infinity.
NO_COUNT = ["0", "-4", "true", "4.0", "NaN", '"4"', "null", "[4]", "{}"]
NO_NUMBER = ["0", "-0.5", "true", "NaN", "Infinity", '"1e-6"', "null", "[1]"]
ENORMOUS = ["1000000000000", "9" * 400]


def cases():
  for kind, fields in COUNTS.items():
    for field in fields:
      optional = field == "chunk"
      for text in NO_COUNT + ENORMOUS:
        if not (optional and text == "null"):
          yield kind, field, text
  for kind, fields in NUMBERS.items():
    for field in fields:
      for text in [*NO_NUMBER, "9" * 400]:
        yield kind, field, text


def changed(kind, field, text):
  """Returns the configuration as read from a file, with one value replaced."""
  fields = json.loads(json.dumps(SMALL[kind]))
  name, _, index = field.partition(".")
  value = json.loads(text)
  if index:
    default = getattr(convert.KINDS[kind].build(SMALL[kind]), name)
    values = [*fields.get(name, default)]
    values[int(index)] = value
    value = values
  return fields | {name: value}


@pytest.mark.parametrize("kind", SMALL)
def test_values_that_no_model_has(kind):
  """Each value is refused at once by a short message that names the field."""
  convert.KINDS[kind].build(json.loads(json.dumps(SMALL[kind])))
  for _, field, text in (case for case in cases() if case[0] == kind):
    name = field.partition(".")[0]
    with pytest.raises((ValueError, TypeError)) as caught:
      pytest.fail(
        f"{field}={text}: "
        f"{convert.KINDS[kind].build(changed(kind, field, text))}"
      )
    assert name in str(caught.value), (field, text)
    assert len(str(caught.value)) < 300, (field, text)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"0"', "true", "null"])
def test_means_of_latents_are_finite(value):
  with pytest.raises(ValueError, match=r"mean\[0\] is .*, expected a finite"):
    convert.KINDS["wan_vae"].build(changed("wan_vae", "mean.0", value))


@pytest.mark.parametrize(
  ("kind", "config", "message"),
  [
    ("wan_dit", {"patch_size": [0, 2, 2]}, r"patch\[0\] is 0"),
    ("wan_dit", {"patch_size": 2}, "patch is 2, expected a list"),
    ("wan_dit", {"patch_size": [1, 2]}, "patch has 2 values, expected 3"),
    ("wan_dit", {"num_layers": True}, "layers is True"),
    ("wan_dit", {"num_layers": 10**9}, "expected at most 1,000"),
    ("wan_dit", {"num_attention_heads": [1]}, "num_attention_heads is"),
    ("wan_dit", {"freq_dim": 1}, "frequencies is 1, expected an even"),
    ("wan_dit", {"attention_head_dim": 10**13}, "expected at most"),
    ("wan_dit", {"ffn_dim": 10**30}, "ffn_width is .*, expected at most"),
    ("wan_dit", {"rope_scale": 2}, "rope_scale is 2, expected a list"),
    ("wan_dit", {"eps": "small"}, "eps is 'small', expected a finite number"),
    ("wan_dit", {"eps": 512}, "eps is 512, expected a number up to 0.1"),
    (
      "clip_vision",
      {"model_type": "clip", "vision_config": []},
      "cannot be re",
    ),
  ],
)
def test_files_of_other_libraries_that_are_absurd(
  tmp_path, kind, config, message
):
  """They are refused before anything of the claimed size is allocated."""
  weights = checkpoints.random_weights()
  if kind == "clip_vision":
    weights = {"visual.pre_norm.weight": weights["proj_out.bias"]}
    base = {}
  else:
    fields = convert.config_of(convert.KINDS[kind].build(checkpoints.T2V))
    base = convert.KINDS[kind].configs["diffusers"](fields)
  checkpoints.write_sharded(tmp_path, weights, 1)
  (tmp_path / "config.json").write_text(json.dumps(base | config))
  with pytest.raises(errors.UserError, match=message):
    convert.load(kind, tmp_path)


def test_a_class_that_is_no_text():
  assert convert.KINDS["wan_dit"].config_from({"_class_name": []}) is None


def test_the_largest_models_that_may_be_asked_for_are_only_counted():
  """Nothing is allocated until the weights are known to fit."""
  fields = checkpoints.T2V | {
    "layers": 40,
    "width": 8_000_000,
    "heads": 4,
    "ffn_width": 10_000_000,
  }
  module = convert.KINDS["wan_dit"].build(fields)
  assert matching.parameters("wan_dit", module)["head_modulation"].shape[
    -1
  ] == (8_000_000)
  with pytest.raises(errors.UserError, match="does not fit"):
    convert.load("wan_dit", checkpoints.random_weights(), fields)
