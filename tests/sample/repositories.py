"""Published repositories, and a stand-in for the hub that has them."""

import huggingface_hub

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
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


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
    CLIP,
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
    CLIP,
    "xlm-roberta-large/tokenizer.json",
  ],
  "dc-ai/dc-ae-v-1.0-f32t4c32": ["README.md", "config.json", "model.pt"],
}
TEXTS = [n for n in _SHARED if n.startswith(("sch", "text_", "tokenizer/"))]


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
