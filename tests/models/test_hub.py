"""Where a model is found: a folder, or the hub."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from harmful_unlearn.errors import UserError
from harmful_unlearn.models import hub
from harmful_unlearn.storage import provenance


def hub_error(kind: type[Exception]) -> Exception:
    response = huggingface_hub.errors.HfHubHTTPError.__new__(kind)
    Exception.__init__(response, "the hub says no")
    return response


def test_a_local_folder_is_itself(tiny_model):
    assert hub.resolve_model(str(tiny_model("opt"))) == tiny_model("opt")
    assert provenance.revision_of(tiny_model("opt")) is None


@pytest.mark.parametrize(
    "error, fix",
    [
        (hub_error(GatedRepoError), "HF_TOKEN"),
        (hub_error(RepositoryNotFoundError), "check the name"),
        (LocalEntryNotFoundError("offline"), "check the path"),
        (ConnectionError("no route"), "check the path"),
    ],
)
def test_hub_errors_name_the_fix(error, fix, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=fix):
        hub.resolve_model("some/model")


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "a/b/c", "~/none"])
def test_a_missing_path_is_no_hub_id(name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no folder"):
        hub.resolve_model(name)


def test_offline_and_not_cached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="check the path"):
        hub.resolve_model("facebook/opt-125m")


def test_hub_downloads_only_what_is_used(monkeypatch, tiny_model):
    patterns = {}

    def download(name, allow_patterns, ignore_patterns):
        patterns.update(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        return str(tiny_model("opt"))

    monkeypatch.setattr(hub, "snapshot_download", download)
    hub.resolve_model("some/model")
    files = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/consolidated.pth",
        "onnx/model.safetensors",
    ]
    assert list(huggingface_hub.utils.filter_repo_objects(files, **patterns)) == files[:7]
    hub.resolve_model("some/model", weights=False)
    assert "model*.safetensors" not in patterns["allow_patterns"]


def cached(cache: Path, tiny: Path, revision: str, ref: str, with_weights: bool) -> Path:
    """A snapshot, stored as in huggingface_hub's cache."""
    repository = cache / "models--some--opt"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for file in tiny.iterdir():
        if with_weights or file.suffix != ".safetensors":
            shutil.copy(file, snapshot / file.name)
    (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(revision)
    return snapshot


def test_pickled_weights_are_taken_from_the_hubs_conversion(monkeypatch, tiny_model, tmp_path):
    """OPT's repositories: main has pickles, the hub's converter put safetensors in a pull request."""
    main = cached(tmp_path, tiny_model("opt"), "a" * 40, "main", with_weights=False)
    cached(tmp_path, tiny_model("opt"), "c" * 40, "old-branch", with_weights=True)  # not the converter's
    converted = cached(tmp_path / "elsewhere", tiny_model("opt"), "b" * 40, "refs/pr/7", with_weights=True)
    downloads, discussions = [], []

    def download(name, revision="main", **_):
        downloads.append((name, revision))
        return str(main if revision == "main" else converted)

    def find(_api, name, author, discussion_type):
        assert (name, author, discussion_type) == ("some/opt", "SFconvertbot", "pull_request")
        return discussions

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "scan_cache_dir", lambda: huggingface_hub.scan_cache_dir(tmp_path))
    monkeypatch.setattr(hub.HfApi, "get_repo_discussions", find)
    discussions.append(SimpleNamespace(title="Another", status="open", git_reference="refs/pr/3"))
    with pytest.raises(UserError, match="pickled"):
        hub.resolve_model("some/opt")
    title = hub.CONVERSION_TITLE
    discussions.append(SimpleNamespace(title=title, status="open", git_reference="refs/pr/7"))
    downloads.clear()
    assert hub.resolve_model("some/opt") == converted
    assert downloads == [("some/opt", "main"), ("some/opt", "refs/pr/7")]
    assert provenance.revision_of(converted) == "b" * 40
    # Once it is cached, the hub is not asked.
    offline = cached(tmp_path, tiny_model("opt"), "b" * 40, "refs/pr/7", with_weights=True)
    monkeypatch.setattr(hub.HfApi, "get_repo_discussions", lambda *_, **__: pytest.fail("asked the hub"))
    assert hub.resolve_model("some/opt") == offline
    assert hub.resolve_model("some/opt", weights=False) == main


def test_pickles_in_a_local_folder_are_refused(tiny_model, tmp_path):
    shutil.copy(tiny_model("opt") / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="save_pretrained"):
        hub.resolve_model(str(tmp_path))
