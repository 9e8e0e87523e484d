"""Repositories that cannot be reached, lack files or are none."""

import importlib
import pathlib

import huggingface_hub
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.sample import hub as hubs
from dcvideogen_jax.sample import layouts
from tests.sample import repositories


@pytest.fixture
def hub(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return repositories.Hub(tmp_path / "cache", monkeypatch)


def test_offline(hub):
  name = "nvidia/DC-VideoGen-Wan2.1-14B"
  online = layouts.locate(name, "t2v")
  hub.offline = True
  told = f"{name} cannot be reached .*: {repositories.COMMIT}"
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
      with pytest.warns(
        UserWarning, match=f"cannot be reached .*{repositories.COMMIT}"
      ):
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
