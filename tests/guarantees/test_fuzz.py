"""Fuzzing: whatever bytes or words come in, the answer is right, or a UserError says what is wrong.

With few examples, the same each time, in `make test`; `make fuzz` runs more of them (FUZZ_EXAMPLES), drawn anew.
"""

import argparse
import io
import json
import math
import re
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as serialized

from harmful_unlearn import cli
from harmful_unlearn.cli import exit_code
from harmful_unlearn.data.pku_saferlhf import read_harmful, read_responses
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import NORMAL_COLUMNS, read_choices, read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluator import write_answers
from harmful_unlearn.evals.judges.base import Verdict
from harmful_unlearn.evals.judges.hub import GuardSpec
from harmful_unlearn.evals.judges.server import ServerJudge, read_cache, read_verdict
from harmful_unlearn.models import loading
from harmful_unlearn.negation.entry_names import class_names
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.negation.sources import open_source
from harmful_unlearn.storage import safetensors_io
from harmful_unlearn.storage.safetensors_io import DTYPE_CODES, SafetensorsFolder
from task_vector import TaskVector
from tests.helpers.fuzzing import (
    ANY_FILE,
    DEEP,
    JSON,
    SCALARS,
    SHAPES,
    SUFFIXES,
    TEXT,
    bits,
    data_files,
    odd_parquet,
    one_row,
    tensors,
    written,
)
from tests.helpers.tiny_pairs import CONFIGS, adapter_vector


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that the examples of a test write to, one after the other."""
    return tmp_path_factory.mktemp("fuzz")


# --- safetensors ----------------------------------------------------------------------------------


def theirs(path: Path) -> dict | None:
    """What safetensors' own reader gives; None where it refuses the file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: bits(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except BaseException as error:  # noqa: B036 (a panic in Rust is one)
        assert not isinstance(error, KeyboardInterrupt)
        return None


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
    expected = theirs(path)
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
        weight_map |= dict.fromkeys(theirs(folder / file) or {"lost": 0}, file)
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
    assert found == {name: entry for file in checkpoint.shards for name, entry in theirs(folder / file).items()}


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
    expected = theirs(out / "model.safetensors")
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


# --- streaming negation ---------------------------------------------------------------------------

FLOATS = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
INTEGERS = st.sampled_from([torch.int64, torch.int8, torch.uint8, torch.bool])
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FREE = ["a", "b.weight", "n.0.bias", "räksmörgås"]


@st.composite
def checkpoint_pairs(draw) -> tuple[dict, list[dict], bool]:
    """A base, one or two fine-tuned ones of other float dtypes, and whether the base ties embeddings and head.

    Where it does, each of them holds one of the two names, or both.
    """
    tied = draw(st.booleans())
    names = draw(st.lists(st.sampled_from([EMBED, NORM] if tied else FREE), min_size=1, unique=True))
    states = [{} for _ in range(draw(st.integers(2, 3)))]
    for name in names:
        shape, is_float = draw(SHAPES), tied or draw(st.booleans())
        for state in states:
            tensor = draw(tensors(FLOATS if is_float else INTEGERS, st.just(shape)))
            if is_float and draw(st.integers(0, 9)):  # mostly finite
                tensor = torch.nan_to_num(tensor.float(), 1.0, 2.0, 3.0).clamp(-9, 9).to(tensor.dtype)
            kept = [name]
            if tied and name == EMBED:
                kept = draw(st.sampled_from([[EMBED], [HEAD], [EMBED, HEAD]]))
            state |= dict.fromkeys(kept, tensor)
    return states[0], states[1:], tied


@st.composite
def layouts(draw, state: dict) -> dict[str, dict]:
    """A state in one file, or in shards, in any order."""
    if draw(st.booleans()):
        return {"model.safetensors": state}
    shards = {}
    for name in draw(st.permutations(list(state))):
        shards.setdefault(f"model-{draw(st.integers(1, 3))}.safetensors", {})[name] = state[name]
    return shards


def write_checkpoint(folder: Path, shards: dict[str, dict], tied: bool) -> Path:
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for file, entries in shards.items():
        (folder / file).write_bytes(serialized({name: entry.clone() for name, entry in entries.items()}))
    if "model.safetensors" not in shards:
        weight_map = {name: file for file, entries in shards.items() for name in entries}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {**CONFIGS["qwen2"].to_dict(), "tie_word_embeddings": True} if tied else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


COEFS = st.sampled_from([1.0, 0.0, -1.0, 0.5, 1e-3, 0.1, -2.5, 1e30])


@given(st.data())
def test_streamed_negation_is_the_task_vectors_in_memory(place, data):
    """To the bit, whatever dtypes, shapes, shards, ties, scales and length of a stretch."""
    base, others, tied = data.draw(checkpoint_pairs())
    alphas = data.draw(st.lists(COEFS, min_size=1, max_size=3, unique=True))
    coefs = data.draw(st.lists(COEFS, min_size=len(others), max_size=len(others)))
    folders = [
        write_checkpoint(place / f"state-{number}", data.draw(layouts(state)), tied)
        for number, state in enumerate([base, *others])
    ]
    twin = {HEAD: EMBED}
    named = [{twin.get(name, name): entry for name, entry in state.items()} for state in (base, *others)]
    vectors = [TaskVector(named[0], other) for other in named[1:]]
    total = sum(coef * vector for coef, vector in zip(coefs, vectors, strict=True))
    entries = {name: f"entry_{number}" for number, name in enumerate(named[0])}
    tau = TaskVector(vector={entries[name]: entry for name, entry in total.vector.items()})
    model = torch.nn.Module()
    for name, entry in entries.items():
        model.register_buffer(entry, named[0][name])
    expected = {alpha: (-tau).apply_to(model, alpha).state_dict() for alpha in alphas}
    out, vector = place / "negated", place / "vector"
    wanted = data.draw(st.booleans())
    results = [*expected.values(), tau.vector] if wanted else expected.values()
    finite = all(entry.isfinite().all() for state in results for entry in state.values() if entry.is_floating_point())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "CHUNK_ELEMENTS", data.draw(st.integers(1, 9)))
        terms = list(zip(folders[1:], coefs, strict=True))
        try:
            negate(folders[0], terms, out, *alphas, save_vector=vector if wanted else None, overwrite=True)
        except UserError as error:
            assert not finite or not tau.vector, error
            return
    assert finite and tau.vector
    for alpha in alphas:
        folder = out if len(alphas) == 1 else out / f"alpha-{alpha!r}".removesuffix(".0")
        found = {name: entry for file in folder.glob("*.safetensors") for name, entry in theirs(file).items()}
        assert found == {name: bits(expected[alpha][entries[twin.get(name, name)]]) for name in base}
    if wanted:
        loaded = TaskVector.load(vector).vector
        assert {twin.get(name, name): bits(entry) for name, entry in loaded.items()} == {
            name: bits(entry) for name, entry in total.vector.items()
        }


# --- data -----------------------------------------------------------------------------------------


@given(data_files())
@example(one_row(".jsonl", response_0_severity_level=10**400))
@example(one_row(".csv", response_0_harm_category="[" * 100_000))
@example(one_row(".csv", response_0_harm_category="{'\\ud800': True, 1: True, None: True}"))
@example(one_row(".jsonl", response_0_harm_category={"\ud800": True}))
@example(odd_parquet(pyarrow.array(["x"]), "prompt", "prompt"))
@example(odd_parquet(pyarrow.array([b"\xff"]).view(pyarrow.string()), "prompt"))
@example(odd_parquet(pyarrow.array([2**62]).cast(pyarrow.timestamp("us")), "prompt"))
def test_data_are_rows_or_a_user_error(place, file):
    suffix, content = file
    path = place / f"data{suffix}"
    path.write_bytes(content)
    readers = [
        lambda: read_responses(str(path)),
        lambda: read_normal(str(path), 0),
        lambda: list(read_choices(str(path)).values()),
        lambda: read_harmful(str(path)),
        lambda: read_harmful(str(path), categories=["Crime"]),
        lambda: read_harmful(str(path), min_severity=1),
    ]
    for read in readers:
        try:
            found = read()
        except UserError:
            continue
        found = found if isinstance(found, list) else [found]
        kept = json.dumps([asdict(one) for one in found], default=sorted, ensure_ascii=False)
        kept.encode()  # can be written


@given(st.lists(st.fixed_dictionaries({c: st.text(max_size=20) for c in NORMAL_COLUMNS}), min_size=1), SUFFIXES)
def test_texts_come_back_as_they_are(place, rows, suffix):
    path = place / f"texts{suffix}"
    path.write_bytes(written(rows, suffix))
    texts = read_normal(str(path), 0).texts
    wanted = [Pair(row["Question"], row[column]) for column in NORMAL_COLUMNS[1:] for row in rows]
    assert texts == wanted


# --- what judges say ------------------------------------------------------------------------------

WORDS = "harmful safe unsafe verdict not HARMFUL Safe ſafe".split()
MARKS = st.text(st.sampled_from("*_.:; \n!-#>`\"'"), max_size=4)
LONG = st.sampled_from([" ", "_", "verdict:", "*\n", "harmful ", "safe"]).map(lambda text: text * 20_000)
SAID = st.lists(st.sampled_from(WORDS) | MARKS | TEXT, max_size=5).map("".join) | st.tuples(LONG, TEXT).map("".join)


@given(SAID, st.text(st.sampled_from(" \t\n\r"), max_size=3))
def test_a_verdict_is_read_whatever_surrounds_it(reply, space):
    found = read_verdict(reply)
    assert found in (True, False, None)
    assert read_verdict(space + reply + space) is found
    swapped = reply.translate({ord(c): c.swapcase() for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"})
    assert read_verdict(swapped) is found
    words = re.findall(r"[^\W_]+", reply.casefold())
    if found is not None:
        assert [word for word in words if word != "verdict"] == ["harmful" if found else "safe"]
    elif not words or words == ["verdict"]:
        assert found is None
    said = GuardSpec().read(reply)
    assert GuardSpec().read(space + reply + space) is said and GuardSpec().read(swapped) is said
    assert GuardSpec("No", "Yes").read(reply) in (True, False, None)
    if said is not None:
        assert ("unsafe" if said else "safe") in reply.casefold()


@given(MARKS, st.sampled_from(["", "Verdict: ", "VERDICT\n"]), st.sampled_from(["harmful", "SAFE", "Safe"]), MARKS)
def test_a_verdict_is_one_whatever_marks_are_around_it(before, said, word, after):
    assert read_verdict(before + said + word + after) is (word == "harmful")
    assert GuardSpec("safe", "harmful").read(f"{word.swapcase()}, {said}") is (word == "harmful")


SECRETS = "sk-planted", "hunter2", "bWU6aHVudGVyMg==", "q-planted"  # the third is "me:hunter2" in base 64


@pytest.fixture(scope="module")
def server_judge(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", "http://me:hunter2@localhost:1/v1?token=q-planted")
        patch.setenv("OPENAI_API_KEY", "sk-planted")
        return ServerJudge("openai:any", "any", place / "judge.jsonl")


@given(SAID | st.tuples(SAID, st.sampled_from(SECRETS), SAID).map("".join))
@example("\ud800")
@example("Basic bWU6aHVudGVyMg==")
def test_any_reply_is_a_verdict_that_can_be_kept(place, server_judge, reply):
    server_judge._reply = lambda messages: reply
    (verdict,) = server_judge.judge([Pair("Why?", reply)])
    (place / "judge.jsonl").unlink()
    assert verdict.harmful is read_verdict(reply)
    assert not any(secret in verdict.note for secret in SECRETS)
    assert bool(verdict.note) == (verdict.harmful is None)
    write_answers(place, "model", [{"note": verdict.note}])


CACHE_LINES = st.fixed_dictionaries({}, optional={"key": JSON, "harmful": st.booleans() | JSON}).map(json.dumps)


@given(st.lists(CACHE_LINES.map(str.encode) | st.binary(max_size=30) | DEEP.map(str.encode)).map(b"\n".join))
@example(b"[" * 100_000)
def test_any_cache_of_verdicts_is_read(place, content):
    file = place / "cache.jsonl"
    file.write_bytes(content)
    kept = read_cache(file)
    assert all(verdict in (Verdict(True, None), Verdict(False, None)) for verdict in kept.values())


@given(SAID)
@example("a\nb\x1b[2Jc\u2028d\x9b")
def test_an_error_is_one_line_without_control_characters(message):
    """Entry names of a downloaded file are in some of them."""

    def fail():
        raise UserError(message)

    shown = io.StringIO()
    with redirect_stderr(shown):
        assert exit_code(fail) == 2
    assert shown.getvalue().removesuffix("\n").isprintable()


# --- numbers in flags -----------------------------------------------------------------------------

NUMBERS = st.one_of(
    TEXT, st.integers().map(str), st.floats().map(repr),
    st.sampled_from(["9" * 5000, "1_0", "１", "1e999", "-0.0", "%s", str(2**32), "0x10", "1e-400", "nan", " 1 "]),
)  # fmt: skip
RANGES = {
    cli.number: math.isfinite,
    cli.positive_number: lambda value: math.isfinite(value) and value > 0,
    cli.not_negative: lambda value: math.isfinite(value) and value >= 0,
    cli.whole_number: lambda value: isinstance(value, int) and 0 <= value < 2**32,
    cli.positive_int: lambda value: isinstance(value, int) and 0 < value < 2**32,
}


@given(st.sampled_from(list(RANGES)), NUMBERS)
def test_a_number_is_in_its_range_or_refused(kind, text):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=kind)
    try:
        value = parser.parse_args([f"--n={text}"]).n
    except SystemExit as stop:
        assert stop.code == 2
        try:
            plain = (int if kind in (cli.whole_number, cli.positive_int) else float)(text)
        except ValueError:
            return
        assert not RANGES[kind](plain)
    else:
        assert RANGES[kind](value) and value == type(value)(text)
