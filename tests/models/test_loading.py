"""Loading and saving: configuration, tokenizer, weights, precision."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from harmful_unlearn.errors import UserError
from harmful_unlearn.models import loading


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "no-such-model"}', '{"model_type": "clip_vision_model"}']
)
def test_broken_or_foreign_config(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        loading.load_config(tmp_path)


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


# --- tokenizers -----------------------------------------------------------------------------------


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


# --- saving ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_layers_that_the_model_would_not_read_are_found(prefix, tiny_model):
    """Also in a file without the LM head's names; not those that the model's class leaves out, nor other lists."""
    model, name = loading.empty_model(loading.load_config(tiny_model("llama"))), prefix + "layers.2.mlp.up_proj.weight"
    others = ["model.layers.1.mlp.up_proj.weight", "model.mtp.7.weight", "model.layers.0.rotary.9.inv_freq"]
    loading.check_layers(model, others, tiny_model("llama"))
    with pytest.raises(UserError, match="has 2 .*layers, and its weights have more .*give the model with its own"):
        loading.check_layers(model, [*others, name], tiny_model("llama"))
    model._keys_to_ignore_on_load_unexpected = {r"layers\.2.*"}
    loading.check_layers(model, [*others, name], tiny_model("llama"))
