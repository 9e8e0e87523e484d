"""Parts are found in directories and repositories; no other file is fetched."""

import importlib
import json
import pathlib

import huggingface_hub
import pytest

from configs import sample as configs
from dcvideogen_jax import errors
from dcvideogen_jax.sample import hub as hubs
from dcvideogen_jax.sample import layouts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_SHARED = [
  ".gitattributes",
  "README.md",
  "assets/teaser.mp4",
  "model_index.json",
  "scheduler/scheduler_config.json",
  "text_encoder/config.json",
  "text_encoder/model-00001-of-00002.safetensors",
  "text_encoder/model-00002-of-00002.safetensors",
  "text_encoder/model.safetensors.index.json",
  "tokenizer/spiece.model",
  "tokenizer/tokenizer.json",
  "tokenizer/tokenizer_config.json",
]
_CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def sharded(folder, count=2):
  stem = f"{folder}diffusion_pytorch_model"
  shards = [
    f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
  ]
  return [f"{folder}config.json", f"{stem}.safetensors.index.json", *shards]


# Names of files as published, by repository.
REPOSITORIES = {
  "nvidia/DC-VideoGen-Wan2.1-14B": [
    *_SHARED,
    *sharded("transformer_t2v/"),
    *sharded("transformer_i2v/"),
    "dc-ae-v-f32t4c32-1.0-bf16.pt",
    _CLIP,
  ],
  "dc-ai/DC-Gen-Wan2.1-I2V-14B": [
    *_SHARED,
    *sharded("transformer/"),
    "dc-ae-v-f32t4c32-1.0.pt",
  ],
  "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": [
    *_SHARED,
    *sharded("transformer/"),
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "image_processor/preprocessor_config.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
  ],
  "Wan-AI/Wan2.1-I2V-14B-720P": [
    "README.md",
    "assets/logo.png",
    "examples/i2v_input.JPG",
    *sharded("", 7),
    "Wan2.1_VAE.pth",
    "google/umt5-xxl/spiece.model",
    "google/umt5-xxl/tokenizer.json",
    "models_t5_umt5-xxl-enc-bf16.pth",
    _CLIP,
    "xlm-roberta-large/tokenizer.json",
  ],
  "dc-ai/dc-ae-v-1.0-f32t4c32": ["README.md", "config.json", "model.pt"],
}
_TEXTS = [n for n in _SHARED if n.startswith(("sch", "text_", "tokenizer/"))]


class Hub:
  """Stands in for the two functions of huggingface_hub that are used."""

  def __init__(self, cache, monkeypatch):
    self.cache = cache
    self.offline = False
    self.files = {k: list(v) for k, v in REPOSITORIES.items()}
    self.fetched = {}
    self.revisions = []
    for function in (self.list_repo_files, self.snapshot_download):
      monkeypatch.setattr(huggingface_hub, function.__name__, function)

  def list_repo_files(self, name, *, revision=None):
    self.revisions.append(revision)
    if self.offline:
      raise ConnectionError("no route to host\n\nCheck your connection.")
    if name not in self.files:
      raise RuntimeError("404 Client Error.\n\nRepository Not Found.")
    return self.files[name]

  def snapshot_download(
    self, name, *, revision=None, allow_patterns=None, local_files_only=False
  ):
    self.revisions.append(revision)
    path = self.cache / name / "snapshots" / COMMIT
    if local_files_only:
      if path.is_dir():
        return str(path)
      raise FileNotFoundError("not in the cache")
    assert set(allow_patterns) <= set(self.files[name])
    self.fetched[name] = sorted(allow_patterns)
    for file in allow_patterns:
      (path / file).parent.mkdir(parents=True, exist_ok=True)
      (path / file).touch()
    return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return Hub(tmp_path / "cache", monkeypatch)


@pytest.mark.parametrize(
  ("name", "task", "expected"),
  [
    (
      "nvidia/DC-VideoGen-Wan2.1-14B",
      "t2v",
      [*_TEXTS, *sharded("transformer_t2v/"), "dc-ae-v-f32t4c32-1.0-bf16.pt"],
    ),
    (
      "nvidia/DC-VideoGen-Wan2.1-14B",
      "i2v",
      [
        *_TEXTS,
        *sharded("transformer_i2v/"),
        "dc-ae-v-f32t4c32-1.0-bf16.pt",
        _CLIP,
      ],
    ),
    (
      "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
      "i2v",
      [
        *_TEXTS,
        *sharded("transformer/"),
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
        *sharded("", 7),
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/spiece.model",
        "google/umt5-xxl/tokenizer.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
        _CLIP,
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
    name, "i2v", autoencoder=space, image_encoder=f"{clip}@{COMMIT}"
  )
  assert hub.fetched == {
    clip: ["image_encoder/config.json", "image_encoder/model.safetensors"],
    space: ["config.json", "model.pt"],
    name: sorted([*_TEXTS, *sharded("transformer/")]),
  }
  assert paths.image_encoder.name == "image_encoder"
  assert paths.dc_ae_v == hub.cache / space / "snapshots" / COMMIT
  assert paths.wan_vae is None
  assert COMMIT in hub.revisions and None in hub.revisions


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
      [*_TEXTS, *sharded("transformer/"), "dc-ae-v-f32t4c32-1.0.pt"]
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


def test_offline(hub):
  name = "nvidia/DC-VideoGen-Wan2.1-14B"
  online = layouts.locate(name, "t2v")
  hub.offline = True
  told = f"{name} cannot be reached .*: {COMMIT}"
  with pytest.warns(UserWarning, match=told):
    assert layouts.locate(name, "t2v") == online
  with (
    pytest.warns(UserWarning, match=told),
    pytest.raises(errors.UserError, match="lacks transformer") as caught,
  ):
    layouts.locate(name, "i2v")
  assert "image_encoder" in str(caught.value)


def network():
  """Returns the network library of the installed huggingface_hub."""
  base = huggingface_hub.errors.HfHubHTTPError.__mro__[1]
  return importlib.import_module(base.__module__.partition(".")[0])


def responding(status):
  request = network().Request("GET", "https://huggingface.co")
  response = network().Response(status, request=request)
  return huggingface_hub.errors.HfHubHTTPError("it said", response=response)


@pytest.mark.parametrize("unreached", [True, False])
def test_only_what_cannot_be_reached_is_taken_from_before(
  hub, monkeypatch, unreached
):
  """If the hub refuses, the local copy may be stale and is not used."""
  name = "nvidia/DC-VideoGen-Wan2.1-14B"
  online = layouts.locate(name, "t2v")
  for error in (
    [
      network().ConnectTimeout("slow"),
      network().ConnectError("refused"),
      huggingface_hub.errors.OfflineModeIsEnabled("offline"),
      responding(503),
    ]
    if unreached
    else [
      responding(401),
      responding(404),
      RuntimeError("no such revision"),
      huggingface_hub.errors.HFValidationError("bad name"),
      OSError("no token"),
    ]
  ):

    def fail(*_, error=error, **__):
      raise error

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    if unreached:
      with pytest.warns(UserWarning, match=f"cannot be reached .*{COMMIT}"):
        assert layouts.locate(name, "t2v") == online
    else:
      with pytest.raises(errors.UserError, match="could not be fetched: "):
        layouts.locate(name, "t2v")


@pytest.mark.parametrize("error", [FileNotFoundError, "incomplete"])
def test_offline_with_a_partial_snapshot(hub, monkeypatch, error):
  """The library refuses snapshots that lack files of another task."""
  name = "nvidia/DC-VideoGen-Wan2.1-14B"
  online = layouts.locate(name, "t2v")
  hub.offline = True

  def refuse(*_, **__):
    if error == "incomplete":
      raise huggingface_hub.errors.IncompleteSnapshotError(
        "incomplete", snapshot_path=str(online.tokenizer.parent)
      )
    raise error("not in the cache")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
  if error == "incomplete":
    with pytest.warns(UserWarning, match="what was fetched before is used"):
      assert layouts.locate(name, "t2v") == online
    return
  with pytest.raises(errors.UserError) as caught:
    layouts.locate(name, "t2v")
  assert str(caught.value).startswith(
    f"{name} is no directory here and could not be fetched: "
    "no route to host Check your connection.; the same models are "
  )


def test_unknown_repository(hub):
  with pytest.raises(errors.UserError, match="Repository Not Found") as caught:
    layouts.locate("nvidia/nothing", "t2v")
  assert "\n" not in str(caught.value)


def test_interrupted_download(hub, monkeypatch):
  def fail(*_, **__):
    raise ConnectionError("reset")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  with pytest.raises(errors.UserError, match="could not be fetched: reset"):
    layouts.locate("nvidia/DC-VideoGen-Wan2.1-14B", "t2v")


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("owner/name", True),
    ("owner/name.v1@refs/pr/1", True),
    ("name", False),
    ("a/b/c", False),
    ("./a", False),
    ("../a", False),
    ("here/is", False),
  ],
)
def test_what_a_repository_is(tmp_path, monkeypatch, text, expected):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("here/is").mkdir(parents=True)
  assert hubs.is_repository(text) == expected


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
  touch(tmp_path, *names, *_TEXTS, *sharded("transformer/"))
  with pytest.raises(errors.UserError, match="several dc_ae_v: .*-a.pt, .*-b"):
    layouts.locate(tmp_path, "t2v")
  paths = layouts.locate(tmp_path, "t2v", autoencoder=tmp_path / names[1])
  assert paths.dc_ae_v == tmp_path / names[1]


def test_wan_autoencoder_is_known_by_its_name(tmp_path):
  touch(tmp_path / "m", *_TEXTS, *sharded("transformer/"), "dc-ae-v.pt")
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
  touch(tmp_path / "m", *_TEXTS, *sharded("transformer/"), "dc-ae-v.pt")
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
