"""Finding, loading and saving models; tokenizers' padding; LoRA; the frozen base."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmful_unlearn.errors import UserError
from harmful_unlearn.models import hub, loading
from harmful_unlearn.models.lora import Lora, check_lora_targets
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.storage import run_record


def hub_error(kind: type[Exception]) -> Exception:
    response = huggingface_hub.errors.HfHubHTTPError.__new__(kind)
    Exception.__init__(response, "the hub says no")
    return response


def test_a_local_folder_is_itself(tiny_model):
    assert hub.resolve_model(str(tiny_model("opt"))) == tiny_model("opt")
    assert run_record.revision_of(tiny_model("opt")) is None


@pytest.mark.parametrize(
    "error, fix",
    [
        (hub_error(GatedRepoError), "HF_TOKEN"),
        (hub_error(RepositoryNotFoundError), "check the name"),
        (LocalEntryNotFoundError("offline"), "give a local folder"),
        (ConnectionError("no route"), "give a local folder"),
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
    with pytest.raises(UserError, match="local folder"):
        hub.resolve_model("facebook/opt-125m")


def test_hub_downloads_only_what_is_used(monkeypatch, tiny_model):
    asked = {}

    def download(name, allow_patterns, ignore_patterns):
        asked.update(name=name, allow=allow_patterns, ignore=ignore_patterns)
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
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow"], ignore_patterns=asked["ignore"]
    )
    assert list(kept) == files[:7]
    hub.resolve_model("some/model", weights=False)
    assert "model*.safetensors" not in asked["allow"]


def cached(cache: Path, tiny: Path, revision: str, ref: str, with_weights: bool) -> Path:
    """A snapshot as huggingface_hub's cache holds it."""
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
    asked, discussions = [], []

    def download(name, revision="main", **_):
        asked.append((name, revision))
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
    asked.clear()
    assert hub.resolve_model("some/opt") == converted
    assert asked == [("some/opt", "main"), ("some/opt", "refs/pr/7")]
    assert run_record.revision_of(converted) == "b" * 40
    # Once it is cached, it is found without the hub.
    offline = cached(tmp_path, tiny_model("opt"), "b" * 40, "refs/pr/7", with_weights=True)
    monkeypatch.setattr(hub.HfApi, "get_repo_discussions", lambda *_, **__: pytest.fail("asked the hub"))
    assert hub.resolve_model("some/opt") == offline
    assert hub.resolve_model("some/opt", weights=False) == main


def test_pickles_in_a_local_folder_are_refused(tiny_model, tmp_path):
    shutil.copy(tiny_model("opt") / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="save_pretrained"):
        hub.resolve_model(str(tmp_path))


@pytest.mark.parametrize("has_unk", [True, False])
def test_missing_pad_token_is_one_inside_the_vocabulary(has_unk, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("pad_token",) if has_unk else ("pad_token", "unk_token"):
        settings.pop(name)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    config = loading.load_config(folder)
    tokenizer = loading.load_tokenizer(folder, config)
    assert tokenizer.pad_token == ("<unk>" if has_unk else "</s>")
    assert 0 <= tokenizer.pad_token_id < config.vocab_size
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(folder))  # no token was added


def test_a_tokenizer_of_another_model_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("opt"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="300 embeddings"):
        loading.load_tokenizer(folder, loading.load_config(folder))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "no-such-model"}', '{"model_type": "clip_vision_model"}']
)
def test_broken_or_foreign_config(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        loading.load_config(tmp_path)


def test_precision():
    assert loading.resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert loading.resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_lora_target_that_the_model_lacks_names_the_candidates(tiny_model):
    structure = loading.empty_model(loading.load_config(tiny_model("llama")))
    with pytest.raises(UserError, match="no module query.*down_proj.*q_proj"):
        check_lora_targets(structure, Lora(4, 8, ("q_proj", "query")))


@pytest.mark.parametrize("architecture", ["opt", "llama", "qwen2"])
def test_saved_and_loaded_again(architecture, tiny_model, tmp_path):
    folder = tiny_model(architecture)
    model = loading.load_model(folder, torch.float32)
    loading.save_model(model, folder, tmp_path)
    again = loading.load_model(tmp_path, torch.float32).state_dict()
    assert all(torch.equal(entry, again[name]) for name, entry in model.state_dict().items())
    assert not list(tmp_path.glob("*.bin"))


def test_a_published_generation_config_that_the_library_would_not_save_comes_along(tiny_model, tmp_path):
    """LLaMA2's: a temperature, and no sampling."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    published = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "bos_token_id": 2, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(published))
    (tmp_path / "out").mkdir()
    loading.save_model(loading.load_model(folder, torch.float32), folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == published


def test_frozen_base_is_frozen(tiny_model):
    base = ReferenceModel(AutoModelForCausalLM.from_pretrained(tiny_model("opt")).train())
    with base.active() as model:
        assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("broken", ["shape", "absent"])
def test_broken_or_absent_tokenizer(broken, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("opt"), tmp_path / "model")
    if broken == "shape":
        (folder / "tokenizer.json").write_text('{"model": 3}')
    else:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        loading.load_tokenizer(folder, loading.load_config(folder))


def test_a_special_token_beyond_the_embeddings_is_no_obstacle(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<image_soft_token>"})
    tokenizer.save_pretrained(folder)
    loaded = loading.load_tokenizer(folder, loading.load_config(folder))
    assert len(loaded) == 701 and loaded.pad_token_id < 700


def test_code_in_a_model_folder_is_never_run(tiny_model, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model("opt"), tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", None]}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(readline=lambda: "y\n", isatty=lambda: True))
    with pytest.raises(UserError):
        loading.load_config(folder)
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": auto}))
    with contextlib.suppress(UserError):
        loading.load_tokenizer(folder, loading.load_config(folder))
    assert not (tmp_path / "ran").exists()
