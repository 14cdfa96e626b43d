"""Sources that cannot be used are refused, and nothing is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate


def set_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def set_entry(folder, change):
    set_weights(folder, lambda state: state.update({NAME: change(state[NAME])}))


def to_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard_names(folder, name):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "a.safetensors")
    index = {"metadata": {}, "weight_map": {entry: "a.safetensors" for entry in state}}
    index["weight_map"][next(iter(state))] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def quantize(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))


NAME = "model.decoder.layers.0.fc1.weight"


BAD = {
    "no folder": (1, shutil.rmtree, "there is no folder"),
    "no weights": (1, lambda f: (f / "model.safetensors").unlink(), "save_pretrained wrote"),
    "only a pickle": (1, to_bin, r"from_pretrained\('.*'\)\.save_pretrained"),
    "pickle base": (0, to_bin, "convert it to safetensors"),
    "no config": (0, lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (0, lambda f: (f / "config.json").write_text("{,"), "not valid JSON"),
    "quantized": (0, quantize, "full-precision"),
    "8-bit": (0, lambda f: set_entry(f, lambda e: e.to(torch.float8_e4m3fn)), "not quantized"),
    "missing shard": (1, lambda f: shard_names(f, "b.safetensors"), "b.safetensors is missing"),
    "shard lacks an entry": (1, lambda f: (shutil.copy(f / "model.safetensors", f / "b.safetensors"),
                                           shard_names(f, "b.safetensors")), "two shards"),
    "parent shard": (1, lambda f: shard_names(f, "../x.safetensors"), "names the file"),
    "absolute shard": (0, lambda f: shard_names(f, "/etc/x.safetensors"), "names the file"),
    "backslash shard": (0, lambda f: shard_names(f, "..\\x.safetensors"), "names the file"),
    "shard of another kind": (0, lambda f: shard_names(f, "x.bin"), "names the file"),
    "shard that is no text": (0, lambda f: shard_names(f, 3), "names the file"),
    "empty file": (1, lambda f: truncate(f, 0), "is broken"),
    "cut header": (1, lambda f: truncate(f, 100), "is broken"),
    "cut data": (0, lambda f: truncate(f, -5), "is broken"),
    "missing entry": (1, lambda f: set_weights(f, lambda s: s.pop(NAME)), f"1 missing: {NAME}"),
    "extra entry": (1, lambda f: set_weights(f, lambda s: s.update(x=torch.ones(2))), "1 extra: x"),
    "other shape": (1, lambda f: set_entry(f, lambda e: torch.ones(2)), "1 of another shape"),
    "integers for weights": (1, lambda f: set_entry(f, lambda e: e.int()), "1 missing"),
    "NaN": (1, lambda f: set_entry(f, lambda e: e * float("nan")), f"{NAME} comes out NaN"),
    "infinite base": (0, lambda f: set_entry(f, lambda e: e / 0), f"{NAME} comes out"),
    "broken record": (1, lambda f: (f / "run.json").write_text("["), "run.json is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_left(case, tmp_path, pair):
    side, spoil, message = BAD[case]
    spoil(pair[side])
    with pytest.raises(UserError, match=message):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0, save_vector=tmp_path / "v")
    assert {file.name for file in tmp_path.iterdir()} <= {"base", "tuned"}


def test_shard_that_lacks_its_entry(tmp_path, pair):
    shard_names(pair[1], "b.safetensors")
    save_file({"other": torch.ones(1)}, pair[1] / "b.safetensors")
    index = json.loads((pair[1] / "model.safetensors.index.json").read_text())
    first = next(name for name, file in index["weight_map"].items() if file == "b.safetensors")
    with pytest.raises(UserError, match=f"lacks {first}"):
        negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 1.0)
