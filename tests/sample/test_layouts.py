"""Parts are found in directories and repositories; no other file is fetched."""

import json

import pytest

from configs import sample as configs
from dcvideogen_jax import errors
from dcvideogen_jax.sample import layouts
from tests.sample import repositories


@pytest.fixture
def hub(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return repositories.Hub(tmp_path / "cache", monkeypatch)


@pytest.mark.parametrize(
  ("name", "task", "expected"),
  [
    (
      "nvidia/DC-VideoGen-Wan2.1-14B",
      "t2v",
      [
        *repositories.TEXTS,
        *repositories.sharded("transformer_t2v/"),
        "dc-ae-v-f32t4c32-1.0-bf16.pt",
      ],
    ),
    (
      "nvidia/DC-VideoGen-Wan2.1-14B",
      "i2v",
      [
        *repositories.TEXTS,
        *repositories.sharded("transformer_i2v/"),
        "dc-ae-v-f32t4c32-1.0-bf16.pt",
        repositories.CLIP,
      ],
    ),
    (
      "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
      "i2v",
      [
        *repositories.TEXTS,
        *repositories.sharded("transformer/"),
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
      ],
    ),
    (
      "Wan-AI/Wan2.1-I2V-14B-720P",
      "i2v",
      [
        *repositories.sharded("", 7),
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/spiece.model",
        "google/umt5-xxl/tokenizer.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
        repositories.CLIP,
      ],
    ),
  ],
)
def test_only_what_a_task_needs_is_fetched(hub, name, task, expected):
  paths = layouts.locate(f"{name}@v1.0", task)
  assert hub.fetched == {name: sorted(expected)}
  assert hub.revisions == ["v1.0", "v1.0"]
  assert paths.transformer.is_relative_to(hub.cache / name / "snapshots")
  assert (paths.image_encoder is None) == (task == "t2v")
  assert (paths.dc_ae_v is None) == name.startswith("Wan")


def test_text_to_video_takes_no_image_encoder(hub):
  name = "nvidia/DC-VideoGen-Wan2.1-14B"
  with pytest.raises(errors.UserError, match="takes no image_encoder, found x"):
    layouts.locate(name, "t2v", image_encoder="x")


def test_parts_from_three_repositories(hub):
  clip = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
  space = "dc-ai/dc-ae-v-1.0-f32t4c32"
  name = "dc-ai/DC-Gen-Wan2.1-I2V-14B"
  paths = layouts.locate(
    name,
    "i2v",
    autoencoder=space,
    image_encoder=f"{clip}@{repositories.COMMIT}",
  )
  assert hub.fetched == {
    clip: ["image_encoder/config.json", "image_encoder/model.safetensors"],
    space: ["config.json", "model.pt"],
    name: sorted([*repositories.TEXTS, *repositories.sharded("transformer/")]),
  }
  assert paths.image_encoder.name == "image_encoder"
  assert paths.dc_ae_v == hub.cache / space / "snapshots" / repositories.COMMIT
  assert paths.wan_vae is None
  assert repositories.COMMIT in hub.revisions and None in hub.revisions


def test_weights_are_fetched_in_one_format(hub):
  name = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
  more = [
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.fp16-00001-of-00001.safetensors",
    "text_encoder/model.safetensors.index.fp16.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "image_encoder/flax_model.msgpack",
  ]
  layouts.locate(name, "i2v")
  expected = hub.fetched[name]
  hub.files[name] += more
  layouts.locate(name, "i2v")
  assert hub.fetched[name] == expected
  hub.files[name].remove("vae/diffusion_pytorch_model.safetensors")
  layouts.locate(name, "i2v")
  assert "vae/diffusion_pytorch_model.fp16.safetensors" in hub.fetched[name]
  assert "vae/diffusion_pytorch_model.bin" not in hub.fetched[name]


def test_nothing_is_fetched_if_a_part_is_missing(hub):
  hub.files["owner/copy"] = hub.files["dc-ai/DC-Gen-Wan2.1-I2V-14B"]
  with pytest.raises(errors.UserError, match="lacks image_encoder") as caught:
    layouts.locate("owner/copy", "i2v")
  assert "no image_encoder was given" in str(caught.value)
  assert not hub.fetched


@pytest.mark.parametrize("revision", ["", "@v1.0"])
def test_clip_of_the_official_image_to_video(hub, revision):
  """The repository has no CLIP: the official code takes Wan's."""
  name = "dc-ai/DC-Gen-Wan2.1-I2V-14B"
  clip = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
  paths = layouts.locate(name + revision, "i2v")
  assert hub.fetched == {
    name: sorted(
      [
        *repositories.TEXTS,
        *repositories.sharded("transformer/"),
        "dc-ae-v-f32t4c32-1.0.pt",
      ]
    ),
    clip: ["image_encoder/config.json", "image_encoder/model.safetensors"],
  }
  assert paths.image_encoder.is_relative_to(hub.cache / clip)
  assert paths.transformer.is_relative_to(hub.cache / name)
  given = layouts.locate(name, "i2v", image_encoder=paths.image_encoder.parent)
  assert given == paths


def test_a_repository_that_is_for_the_other_task(hub):
  told = (
    "dc-ai/DC-Gen-Wan2.1-T2V-14B@v1 is for t2v, not i2v: expected "
    "dc-ai/DC-Gen-Wan2.1-I2V-14B or nvidia/DC-VideoGen-Wan2.1-14B"
  )
  with pytest.raises(errors.UserError) as caught:
    layouts.locate("dc-ai/DC-Gen-Wan2.1-T2V-14B@v1", "i2v")
  assert str(caught.value) == told
  assert not hub.revisions


@pytest.mark.parametrize(
  ("name", "others"),
  [
    ("dc-ai/DC-Gen-Wan2.1-T2V-14B", ["nvidia/DC-VideoGen-Wan2.1-14B"]),
    ("dc-ai/DC-Gen-Wan2.1-I2V-14B", ["nvidia/DC-VideoGen-Wan2.1-14B"]),
    (
      "nvidia/DC-VideoGen-Wan2.1-14B",
      ["dc-ai/DC-Gen-Wan2.1-T2V-14B", "dc-ai/DC-Gen-Wan2.1-I2V-14B"],
    ),
  ],
)
def test_both_names_of_what_cannot_be_fetched(hub, name, others):
  hub.files.clear()
  task = "i2v" if "I2V" in name else "t2v"
  with pytest.raises(errors.UserError, match="Repository Not Found") as caught:
    layouts.locate(name, task)
  assert all(other in str(caught.value) for other in [name, *others])


def test_configs_name_what_is_published(hub):
  """The repositories of sampling's configs have all parts of their task."""
  name = "dc-ai/DC-Gen-Wan2.1-T2V-14B"
  hub.files[name] = hub.files["dc-ai/DC-Gen-Wan2.1-I2V-14B"]
  for model in ("dc-t2v-14b", "dc-i2v-14b"):
    c = configs.get_config(model)
    assert c.model.startswith("dc-ai/DC-Gen-Wan2.1-")
    paths = layouts.locate(c.model, c.task)
    assert paths.dc_ae_v is not None
    assert (paths.image_encoder is None) == (c.task == "t2v")


# --- directories -------------------------------------------------------------


def touch(directory, *names):
  for name in names:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).touch()
  return directory


def test_find_reports_what_is_there(tmp_path):
  assert layouts.find(tmp_path, "t2v") == layouts.Paths()
  touch(tmp_path, "transformer_i2v/config.json", "vae/config.json")
  assert layouts.find(tmp_path, "t2v").transformer is None
  found = layouts.find(tmp_path, "i2v")
  assert found.transformer == tmp_path / "transformer_i2v"
  assert found.wan_vae == tmp_path / "vae"


def test_several_files_for_a_part(tmp_path):
  names = ["dc-ae-v-a.pt", "dc-ae-v-b.pt"]
  touch(
    tmp_path, *names, *repositories.TEXTS, *repositories.sharded("transformer/")
  )
  with pytest.raises(errors.UserError, match="several dc_ae_v: .*-a.pt, .*-b"):
    layouts.locate(tmp_path, "t2v")
  paths = layouts.locate(tmp_path, "t2v", autoencoder=tmp_path / names[1])
  assert paths.dc_ae_v == tmp_path / names[1]


def test_wan_autoencoder_is_known_by_its_name(tmp_path):
  touch(
    tmp_path / "m",
    *repositories.TEXTS,
    *repositories.sharded("transformer/"),
    "dc-ae-v.pt",
  )
  touch(tmp_path, "o/Wan2.1_VAE.pth", "mine.pt")
  file = tmp_path / "o" / "Wan2.1_VAE.pth"
  for given in (file, tmp_path / "o"):
    paths = layouts.locate(tmp_path / "m", "t2v", autoencoder=given)
    assert (paths.wan_vae, paths.dc_ae_v) == (file, None)
  own = tmp_path / "mine.pt"
  paths = layouts.locate(tmp_path / "m", "t2v", autoencoder=own)
  assert (paths.wan_vae, paths.dc_ae_v) == (None, own)


def test_gguf_files_beside_each_other(tmp_path):
  """By the names under which they are published."""
  names = ("wan2.1-t2v-14b-Q8_0.gguf", "wan2.1-i2v-14b-480p-Q4_K_M.gguf")
  encoder = "umt5-xxl-encoder-Q5_K_M.gguf"
  touch(
    tmp_path, *names, encoder, "tokenizer/tokenizer.json", "vae/config.json"
  )
  for task, name in zip(("t2v", "i2v"), names, strict=True):
    paths = layouts.find(tmp_path, task)
    assert paths.transformer == tmp_path / name
    assert paths.text_encoder == tmp_path / encoder
  touch(tmp_path, "wan2.1-t2v-14b-Q4_0.gguf")
  with pytest.raises(errors.UserError, match="holds several transformer: wan2"):
    layouts.find(tmp_path, "t2v")


def test_parts_elsewhere(tmp_path):
  touch(
    tmp_path / "m",
    *repositories.TEXTS,
    *repositories.sharded("transformer/"),
    "dc-ae-v.pt",
  )
  touch(tmp_path, "other/ae.pt")
  (tmp_path / "m" / "parts.json").write_text('{"dc_ae_v": "../other/ae.pt"}')
  paths = layouts.locate(tmp_path / "m", "t2v")
  assert paths.dc_ae_v.samefile(tmp_path / "other" / "ae.pt")
  assert paths.transformer == tmp_path / "m" / "transformer"
  # An argument comes before parts.json, and may be such a directory itself.
  given = tmp_path / "m" / "dc-ae-v.pt"
  assert layouts.locate(tmp_path / "m", "t2v", autoencoder=given) == (
    paths._replace(dc_ae_v=given)
  )
  again = layouts.locate(tmp_path / "m", "t2v", autoencoder=tmp_path / "m")
  assert again == paths


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "parts.json is not readable as JSON"),
    ("[]", "is not an object of parts"),
    ('{"vae": "x"}', "no meaning for vae: expected transformer,"),
    ('{"tokens": 3}', "no meaning for tokens: expected .*, text_tokens"),
    ("[" * 100_000, "not readable as JSON: it is nested too deep"),
    ('{"dc_ae_v": "a", "dc_ae_v": "b"}', "it has 'dc_ae_v' twice"),
    (json.dumps({"dc_ae_v": "x" * 5000}), "there is no xxx"),
    ('{"text_tokens": true}', "must be a whole number from 1 to"),
    ('{"text_tokens": 1000000000}', "must be a whole number from 1 to"),
    ('{"dc_ae_v": 3}', "dc_ae_v is no path: found 3"),
    (json.dumps({"dc_ae_v": "../gone"}), "there is no .*gone for dc_ae_v"),
  ],
)
def test_damaged_parts_elsewhere(tmp_path, text, message):
  (tmp_path / "parts.json").write_text(text)
  with pytest.raises(errors.UserError, match=message):
    layouts.find(tmp_path, "t2v")


def test_no_directory(tmp_path):
  with pytest.raises(errors.UserError, match="there is no directory"):
    layouts.locate(tmp_path / "gone", "t2v")
