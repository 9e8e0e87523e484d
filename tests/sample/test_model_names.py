"""The flag `--lora`: a file, its scale, and what is left out."""

import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.sample import model_names


@pytest.mark.parametrize(
  ("end", "scale", "skip"),
  [
    ("", 1.0, ()),
    (",0.5", 0.5, ()),
    (",-2e-1", -0.2, ()),
    (",skip=interface", 1.0, ("interface",)),
    (",0.5,skip=interface", 0.5, ("interface",)),
    (",skip=a,b", 1.0, ("a,b",)),
    (
      ",1,skip=ffn.*(0|2),skip=blocks.{1,2}",
      1.0,
      ("ffn.*(0|2)", "blocks.{1,2}"),
    ),
  ],
)
@pytest.mark.parametrize("name", ["style.safetensors", "a,b.safetensors"])
def test_files_and_what_is_left_out(tmp_path, name, end, scale, skip):
  path = tmp_path / name
  path.touch()
  found = model_names.lora(f"{path}{end}")
  assert found == (str(path), scale, skip)


@pytest.mark.parametrize(
  ("end", "message"),
  [
    (",much", "there is no file"),
    (",inf", ",inf: the scale must be finite"),
    (",skip=", "expected PATH,SCALE,skip=PATTERN, with a scale before"),
    (",skip=interface,0.5", "with a scale before the patterns"),
    (",skip=(", "skip=( is no regular expression: missing )"),
  ],
)
def test_what_cannot_be_parsed(tmp_path, end, message):
  path = tmp_path / "style.safetensors"
  path.touch()
  with pytest.raises(errors.UserError) as e:
    model_names.lora(f"{path}{end}")
  assert message in str(e.value)
