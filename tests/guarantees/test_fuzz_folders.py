"""Random model folders: safetensors, indices, adapters, records, configurations."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save as serialized

from harmful_unlearn.errors import UserError
from harmful_unlearn.models import loading
from harmful_unlearn.negation.entry_names import class_names
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.negation.sources import open_source
from harmful_unlearn.storage.safetensors_io import DTYPE_CODES, SafetensorsFolder
from tests.helpers.inputs.fuzzing import ANY_FILE, JSON, SCALARS, SHAPES, bits, read_by_library, tensors
from tests.helpers.models.tiny_pairs import CONFIGS, adapter_vector


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that the examples of a test write to, one after the other."""
    return tmp_path_factory.mktemp("fuzz")


def header(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@given(ANY_FILE)
@example(b"")
@example((2**63).to_bytes(8, "little") + b"{}")
@example(b'\x3e\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}')
def test_a_file_is_read_as_safetensors_reads_it(place, content):
    path = place / "model.safetensors"
    path.write_bytes(content)
    expected = read_by_library(path)
    try:
        checkpoint = SafetensorsFolder(place)
        found = {name: bits(checkpoint.read(name)) for name in checkpoint.specs}
    except UserError:
        # Nothing that can be read is refused, but for dtypes that are not computed with.
        assert expected is None or {entry["dtype"] for name, entry in header(path).items() if name in expected} - {
            *DTYPE_CODES.values()
        }
    else:
        assert found == expected
        assert sum(spec.nbytes for spec in checkpoint.specs.values()) <= len(content)


FILE_NAMES = st.sampled_from(["a.safetensors", "b.safetensors"])
ODD_NAMES = st.sampled_from(
    ["../a.safetensors", "/a.safetensors", "c.safetensors", ".safetensors", "a" * 300 + ".safetensors",
     "a\0.safetensors", "\ud800.safetensors", "a.safetensors\n", "a.bin", "..", "a/../a.safetensors"]
)  # fmt: skip


@given(
    st.dictionaries(FILE_NAMES, ANY_FILE, min_size=1),
    st.lists(FILE_NAMES | ODD_NAMES | SCALARS, max_size=3),
    st.none() | JSON | st.binary(max_size=40),
)
@example({"a.safetensors": serialized({"a": torch.ones(1)})}, ["a" * 300 + ".safetensors"], None)
def test_an_index_and_its_shards(place, files, extra, instead):
    """Each shard as safetensors reads it, or nothing at all."""
    folder = place / "sharded"
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for file, content in files.items():
        (folder / file).write_bytes(content)
        weight_map |= dict.fromkeys(read_by_library(folder / file) or {"lost": 0}, file)
    weight_map |= {f"extra {number}": file for number, file in enumerate(extra)}
    index = {"weight_map": weight_map} if instead is None else instead
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / "model.safetensors.index.json").write_bytes(text)
    try:
        checkpoint = SafetensorsFolder(folder)
        found = {name: bits(checkpoint.read(name)) for name in checkpoint.specs}
    except UserError:
        return
    assert set(checkpoint.shards) <= {"a.safetensors", "b.safetensors"}
    assert found == {
        name: entry for file in checkpoint.shards for name, entry in read_by_library(folder / file).items()
    }


LORA_CONFIG = st.fixed_dictionaries(
    {"peft_type": st.just("LORA")},
    optional={
        "lora_alpha": st.integers(1, 9) | SCALARS,
        "r": SCALARS,
        "bias": st.just("none") | SCALARS,
        "init_lora_weights": JSON,
        "use_rslora": JSON,
        "fan_in_fan_out": JSON,
        "alpha_pattern": st.dictionaries(st.sampled_from(["a", "(", "*", ".*"]), st.integers(1, 9) | SCALARS) | JSON,
        "modules_to_save": st.none() | JSON,
    },
)


MATRICES = torch.ones(1, 2), torch.ones(3, 1)


@given(
    LORA_CONFIG | JSON,
    tensors(shapes=st.tuples(st.integers(0, 3), st.integers(0, 3)) | SHAPES),
    tensors(shapes=st.tuples(st.integers(0, 3), st.integers(0, 3)) | SHAPES),
    st.none() | ANY_FILE,
)
@example({"peft_type": "LORA", "lora_alpha": "16"}, *MATRICES, None)
@example({"peft_type": "LORA", "lora_alpha": 1e300}, *MATRICES, None)
@example({"peft_type": "LORA", "alpha_pattern": {"(": 1}}, *MATRICES, None)
@example({"peft_type": "LORA", "alpha_pattern": [1]}, *MATRICES, None)
@example({"peft_type": "LORA"}, torch.ones(0, 2), torch.ones(3, 0), None)
def test_an_adapter(place, config, a, b, instead):
    """tau = scaling * B @ A in the weight's shape, or a UserError."""
    folder = place / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    state = {"base_model.model.a.lora_A.weight": a, "base_model.model.a.lora_B.weight": b}
    (folder / "adapter_model.safetensors").write_bytes(serialized(state) if instead is None else instead)
    try:
        source = open_source(folder)
        vector = adapter_vector(folder).vector
    except UserError:
        return
    assert {name: tuple(entry.shape) for name, entry in vector.items()} == {
        name: spec.shape for name, spec in source.specs.items()
    }


TUNED = serialized({"a": torch.ones(1, 2), "n": torch.tensor(3)})
RUN_KEYS = st.sampled_from(
    ["base", "finetuned", "flags", "stage_1", "stage_1_of_model_1", "harmful", "harmful_if_subtracted", "training"]
)
RUN = st.dictionaries(RUN_KEYS, st.dictionaries(RUN_KEYS | st.sampled_from(["method", "name"]), JSON) | JSON) | JSON


@given(ANY_FILE, RUN, st.binary(max_size=40) | JSON, st.sampled_from(["model", "task_vector"]))
@example(TUNED, {"flags": 1}, {}, "model")
@example(TUNED, {"finetuned": {"x": 1}, "stage_1": {"flags": {"scaling_coef": "3", "safe_weight": 1}}}, {}, "model")
@example(serialized({"b": torch.ones(1)}), {}, {"model_type": "qwen2", "num_hidden_layers": 0}, "model")
def test_negation_is_whole_or_not_at_all(place, content, run, config, stem):
    base, tuned, out = (place / name for name in ("base", "tuned", "out"))
    for folder in (base, tuned):
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
    state = {"a": torch.tensor([[1.0, 2.0]]), "n": torch.tensor(3)}
    (base / "model.safetensors").write_bytes(serialized(state))
    (base / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    (tuned / f"{stem}.safetensors").write_bytes(content)
    (tuned / "run.json").write_text(json.dumps(run))
    try:
        negate(base, [(tuned, 1.0)], out, 0.5, overwrite=True)
    except UserError:
        assert not out.exists()
        return
    expected = read_by_library(out / "model.safetensors")
    assert expected.keys() == state.keys() and expected["n"] == bits(state["n"])
    for file in out.iterdir():
        file.unlink()
    out.rmdir()


ODD_SETTINGS = st.sampled_from([None, True, -1, 0, 1, 3, 0.5, 2**63, "", "x", [], [1], {}, {"a": 1}, "\ud800"])
FIELDS = sorted({field for config in CONFIGS.values() for field in config.to_dict()} - {"num_hidden_layers", "n_layer"})


@given(st.sampled_from(sorted(CONFIGS)), st.dictionaries(st.sampled_from(FIELDS), ODD_SETTINGS | JSON, max_size=2))
@example("opt", {"num_attention_heads": 3})
@example("qwen2", {"hidden_act": "x"})
@example("gpt2", {"architectures": []})
@example("llama", {"hidden_size": "x"})
def test_a_configuration(place, architecture, changes):
    """Numbers of layers are left alone: a model of 2**31 layers is made for hours."""
    folder = place / "configuration"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[architecture].to_dict(), **changes}))
    try:
        loading.empty_model(loading.load_config(folder))
    except UserError:
        return
    synonyms, is_constant = class_names(folder)
    assert synonyms("a")[0] == "a" and not is_constant("a")
