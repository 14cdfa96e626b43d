"""data.py and dataloader/: both schemas, every format, every error, the order of batches, the fetch."""

import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harmful_unlearn.data.batch_sampler import BatchSampler
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.prompt_format import Pair, format_pair, format_prefix
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
EARLY = GOLDENS / "pku_saferlhf.jsonl"
TODAY = GOLDENS / "pku_saferlhf_current_schema.jsonl"
TRUTHFUL = GOLDENS / "TruthfulQA.csv"
FORMATS = ("jsonl", "json", "csv", "parquet")


@pytest.fixture(scope="session")
def golden():
    return json.loads((GOLDENS / "golden.json").read_text())


@pytest.fixture(scope="session")
def decode():
    """Token ids to text, exactly (byte-level BPE)."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(GOLDENS / "model" / "tokenizer.json"))
    return lambda ids: tokenizer.decode(ids)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(prompt="p", answers=("a", "b"), safe=(False, False), **more) -> dict:
    return {
        "prompt": prompt,
        "response_0": answers[0],
        "response_1": answers[1],
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        **more,
    }


def write(folder: Path, rows: list[dict], suffix: str = "jsonl") -> str:
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif suffix == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return str(path)


def error_of(read, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        read(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message, "one line"
    return message


def strip_source(data_read):
    return data_read.pairs, data_read.answers, data_read.rows


# ------------------------------------------------------------------------------- harmful pairs


def test_prefix_and_pair_text():
    assert format_prefix("q?") == "### Question: q?\n ### Answer: "
    assert format_pair("q?", "a") == "### Question: q?\n ### Answer: a"


@pytest.mark.parametrize("path", [EARLY, TODAY])
def test_harmful_equals_golden(path, golden, decode):
    read = read_harmful(str(path))
    texts = [format_pair(pair.question, pair.answer) for pair in read.pairs]
    expected = [decode(example["input_ids"]) for example in golden["harmful_examples"]]
    assert texts == expected and len(texts) == 14 and read.rows == 12
    assert len(read.answers) == golden["harmful_answer_pool_size"]
    assert read.answers[0][:40] == golden["harmful_answer_pool_first"][:40]
    assert read.source["rows"] == 12 and read.source["pairs"] == 14


def test_pair_order_and_pool_order(tmp_path):
    rows = [
        row("p0", ("p0r0", "p0r1")),
        row("p1", ("p1r0", "p1r1"), safe=(True, True)),
        row("p2", ("p2r0", "p2r1"), safe=(True, False)),
        row("p3", ("p3r0", "p3r1"), safe=(False, True)),
    ]
    read = read_harmful(write(tmp_path, rows))
    assert [pair.answer for pair in read.pairs] == ["p0r0", "p0r1", "p2r1", "p3r0"]
    assert [pair.question for pair in read.pairs] == ["p0", "p0", "p2", "p3"]
    assert read.answers == ["p0r0", "p3r0", "p0r1", "p2r1"]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("selection", [{}, {"categories": ["Violence"]}, {"min_severity": 2}])
def test_every_format_gives_the_same(suffix, selection, tmp_path):
    expected = strip_source(read_harmful(str(TODAY), **selection))
    path = write(tmp_path, rows_of(TODAY), suffix)
    assert strip_source(read_harmful(path, **selection)) == expected


def test_a_folder_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(TODAY, folder / "train.jsonl")
    shutil.copy(EARLY, folder / "test.jsonl")
    for selection in ({}, {"categories": ["Violence"], "min_severity": 1}):
        read = read_harmful(str(folder), **selection)
        assert strip_source(read) == strip_source(read_harmful(str(TODAY), **selection))
    assert read.source["split"] == "train"
    message = error_of(read_harmful, str(folder), split="validation")
    assert "validation" in message and "split" in message


EDGES = [
    row("### Question: x\n ### Answer: y", ("", "### Answer: ")),
    row('Question: "quoted", with; commas', ("line\nline\n\n  end ", "tab\tand\ttab")),
    row("", ("é漢字🙂\u200d\u2028\u2029\x85", "None")),
    row("NA", ("nan", "null")),
    row("long", ("word " * 60_000, "true")),
]


@pytest.mark.parametrize("suffix", FORMATS)
def test_texts_are_kept_as_they_are(suffix, tmp_path):
    read = read_harmful(write(tmp_path, EDGES, suffix))
    expected = [Pair(edge["prompt"], edge[f"response_{i}"]) for edge in EDGES for i in (0, 1)]
    assert read.pairs == expected


def test_raw_line_separators_do_not_split_jsonl(tmp_path):
    path = tmp_path / "raw.jsonl"
    lines = [json.dumps(edge, ensure_ascii=False) for edge in EDGES]
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(lines) + "\r\n\n").encode())
    assert read_harmful(str(path)).pairs[4].answer == EDGES[2]["response_0"]


@pytest.mark.parametrize("absent", [None, float("nan")])
@pytest.mark.parametrize("suffix", FORMATS)
def test_absent_text_is_empty(absent, suffix, tmp_path):
    read = read_harmful(write(tmp_path, [row(answers=("a", absent))], suffix))
    assert read.pairs == [Pair("p", "a"), Pair("p", "")]
    assert read.answers == ["a", ""]


@pytest.mark.parametrize("suffix", ("jsonl", "csv"))
@pytest.mark.parametrize("no, yes", [(False, True), (0, 1), ("false", "true"), ("FALSE", "True"), ("0", "1")])
def test_labels(no, yes, suffix, tmp_path):
    read = read_harmful(write(tmp_path, [row(safe=(no, yes)), row(safe=(yes, no))], suffix))
    assert [pair.answer for pair in read.pairs] == ["a", "b"]


@pytest.mark.parametrize("label", [None, "", "yes", 2, [], {}, float("nan")])
def test_bad_label_names_row_and_value(label, tmp_path):
    path = write(tmp_path, [row(), row(safe=(False, label))])
    message = error_of(read_harmful, path)
    assert "row 2" in message and "is_response_1_safe" in message and repr(label)[:10] in message


@pytest.mark.parametrize("value", [7, 1.5, True, ["a"], {"a": "b"}, "\ud83d"])
def test_bad_text_names_row_and_column(value, tmp_path):
    message = error_of(read_harmful, write(tmp_path, [row(), row(answers=(value, "b"))]))
    assert "row 2" in message and "response_0" in message
    message.encode()


def test_json_file_may_hold_lines_and_jsonl_a_list(tmp_path):
    for source, suffix in ((EARLY, "json"), (Path(write(tmp_path, rows_of(EARLY), "json")), "jsonl")):
        path = tmp_path / f"other.{suffix}"
        shutil.copy(source, path)
        assert strip_source(read_harmful(str(path))) == strip_source(read_harmful(str(EARLY)))


def test_suffix_in_capitals(tmp_path):
    shutil.copy(EARLY, tmp_path / "DATA.JSONL")
    assert read_harmful(str(tmp_path / "DATA.JSONL")).rows == 12


def test_home_and_relative_paths(tmp_path, monkeypatch):
    shutil.copy(EARLY, tmp_path / "x.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/x.jsonl", "x.jsonl", "./x.jsonl", "../" + tmp_path.name + "/x.jsonl"):
        assert read_harmful(name).rows == 12


def test_source_of_a_file():
    source = read_harmful(str(TODAY), categories=["Violence"], min_severity=1).source
    assert source["sha256"] == hashlib.sha256(TODAY.read_bytes()).hexdigest()
    assert source["name"] == str(TODAY) and source["revision"] is None
    assert source["selection"] == {"categories": ["Violence"], "min_severity": 1}
    json.dumps(source)


# ------------------------------------------------------------------------------------- selection


def harms(*names) -> dict:
    return {name: name in names for name in ("Violence", "Privacy Violation", "White-Collar Crime")}


def graded(answers, safe, categories, levels) -> dict:
    more = {}
    for i in (0, 1):
        more[f"response_{i}_harm_category"] = harms(*categories[i])
        more[f"response_{i}_severity_level"] = levels[i]
    return row("p", answers, safe, **more)


GRADED = [
    graded(("a0", "a1"), (False, False), (["Violence"], ["Privacy Violation"]), (1, 3)),
    graded(("b0", "b1"), (False, True), (["Violence", "White-Collar Crime"], ["Violence"]), (2, 3)),
    graded(("c0", "c1"), (True, False), (["Violence"], ["White-Collar Crime"]), (3, 0)),
]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "selection, pairs, pool",
    [
        ({"categories": ["Violence"]}, ["a0", "b0"], ["a0", "b0"]),
        ({"categories": ["White-Collar Crime", "Privacy Violation"]}, ["a1", "b0", "c1"], ["b0", "a1", "c1"]),
        ({"min_severity": 2}, ["a1", "b0"], ["b0", "a1"]),
        ({"min_severity": 0}, ["a0", "a1", "b0", "c1"], ["a0", "b0", "a1", "c1"]),
        ({"categories": ["Violence"], "min_severity": 2}, ["b0"], ["b0"]),
    ],
)
def test_selection_is_per_response(selection, pairs, pool, suffix, tmp_path):
    read = read_harmful(write(tmp_path, GRADED, suffix), **selection)
    assert [pair.answer for pair in read.pairs] == pairs
    assert read.answers == pool
    assert read.rows == 3


def test_categories_of_a_csv_as_json(tmp_path):
    rows = [dict(entry) for entry in GRADED]
    for entry in rows:
        for i in (0, 1):
            entry[f"response_{i}_harm_category"] = json.dumps(entry[f"response_{i}_harm_category"])
    read = read_harmful(write(tmp_path, rows, "csv"), categories=["Violence"])
    assert [pair.answer for pair in read.pairs] == ["a0", "b0"]


def test_absent_category_or_level_selects_nothing(tmp_path):
    rows = [*GRADED, {**GRADED[0], "response_0_harm_category": None, "response_0_severity_level": None}]
    read = read_harmful(write(tmp_path, rows), categories=["Violence"], min_severity=1)
    assert [pair.answer for pair in read.pairs] == ["a0", "b0"]


@pytest.mark.parametrize("cell", ["{", "__import__('os')", "[1]", "(" * 5000, {"Violence": "perhaps"}, 3])
def test_broken_category(cell, tmp_path):
    rows = [GRADED[0], {**GRADED[1], "response_1_harm_category": cell}]
    message = error_of(read_harmful, write(tmp_path, rows), categories=["Violence"])
    assert "row 2" in message and "response_1_harm_category" in message
    assert len(read_harmful(write(tmp_path, rows)).pairs) == 3, "unread when nothing is selected"


def test_broken_severity(tmp_path):
    rows = [{**GRADED[0], "response_0_severity_level": "high"}]
    message = error_of(read_harmful, write(tmp_path, rows), min_severity=1)
    assert "row 1" in message and "'high'" in message


@pytest.mark.parametrize("selection", [{"categories": ["Violence"]}, {"min_severity": 1}])
def test_selecting_from_early_data(selection):
    message = error_of(read_harmful, str(EARLY), **selection)
    assert "--harmful_revision main" in message


def test_unknown_category_lists_the_known():
    message = error_of(read_harmful, str(TODAY), categories=["Violence", "Gossip"])
    assert "'Gossip'" in message and "'Privacy Violation'" in message and "--harm_category" in message


def test_nothing_left():
    assert "--min_severity" in error_of(read_harmful, str(TODAY), min_severity=9)


def test_nothing_unsafe(tmp_path):
    message = error_of(read_harmful, write(tmp_path, [row(safe=(True, True))]))
    assert "unsafe" in message and "--harmful_dataset" in message


# --------------------------------------------------------------------------------- broken files


def broken(tmp_path, name, content) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "read, flag", [(read_harmful, "--harmful_dataset"), (lambda name: read_normal(name, 0), "--normal_dataset")]
)
@pytest.mark.parametrize(
    "name, content, says",
    [
        ("empty.jsonl", b"", "empty"),
        ("empty.csv", b"\n \n", "empty"),
        ("empty.json", b"[]", "no rows"),
        ("header.csv", b"prompt,response_0,Question,Best Answer\n", "no rows"),
        ("text.txt", b"hello", "format"),
        ("none", b"hello", "format"),
        ("garbage.parquet", b"PAR1 not at all", "Parquet"),
        ("quote.csv", b'a,b\n"x,1\n', "CSV"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", "CSV"),
        ("wide.csv", b"a,b\n1,2,3\n4,5,6\n", "header"),
        ("scalar.jsonl", b'{"a": 1}\n5\n', "line 2"),
        ("scalars.json", b'[{"a": 1}, 5]', "row 2"),
        ("columns.jsonl", b'{"colour": 1}\n', "colour"),
        ("columns.csv", b"colour\nred\n", "colour"),
    ],
)
def test_broken_file(read, flag, name, content, says, tmp_path):
    path = broken(tmp_path, name, content)
    message = error_of(read, path)
    assert says in message and flag in message and path in message


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("cut.jsonl", EARLY.read_bytes()[:-40], 12),
        ("middle.jsonl", b'{"a": 1}\n\n{"a": }\n{"a": 2}\n', 3),
        ("list.json", b'[\n{"a": 1},\n{"a": }\n]', 3),
        ("digits.jsonl", b'{"a": ' + b"1" * 5000 + b"}", 1),
    ],
)
def test_broken_json_names_its_line(name, content, line, tmp_path):
    assert f"line {line} " in error_of(read_harmful, broken(tmp_path, name, content))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_not_utf8(name, encoding, tmp_path):
    path = broken(tmp_path, name, '{"prompt": "caf\xe9"}'.encode(encoding))
    assert "save it as UTF-8" in error_of(read_harmful, path)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/no/such/file", "a/b/c", "no/such.CSV"])
def test_missing_file_needs_no_hub(name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", None)
    assert "--harmful_dataset" in error_of(read_harmful, name)
    assert "make data" in error_of(read_normal, name, 0)


def test_missing_columns_are_listed(tmp_path):
    rows = [{key: value for key, value in row().items() if key not in ("prompt", "is_response_1_safe")}]
    message = error_of(read_harmful, write(tmp_path, rows))
    assert "columns prompt, is_response_1_safe (it has response_0, response_1, is_response_0_safe)" in message
    message = error_of(read_normal, write(tmp_path, [{"Question": "q", "Best": "a"}], "csv"), 0)
    assert "columns Best Answer, Correct Answers (it has Question, Best)" in message
    assert "make data" in message


# -------------------------------------------------------------------------------------- the hub

HUB = "PKU-Alignment/PKU-SafeRLHF"


@pytest.fixture
def hub(monkeypatch):
    """`load_dataset` stands for the hub: it records its call and returns or raises `hub.answer`."""
    import datasets

    class Hub:
        answer = None

        def load_dataset(self, *args, **kwargs):
            self.call = args, kwargs
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def test_hub_gives_the_same_as_a_file(hub):
    import datasets

    hub.answer = datasets.Dataset.from_list(rows_of(TODAY))
    for selection in ({}, {"categories": ["Violence"]}, {"min_severity": 2}):
        read = read_harmful(HUB, revision="main", split="train", **selection)
        assert strip_source(read) == strip_source(read_harmful(str(TODAY), **selection))
    assert hub.call == ((HUB, None), {"revision": "main", "split": "train"})
    assert read.source["name"] == HUB and read.source["revision"] == "main"


def test_revision_found_is_recorded_and_must_be_the_one_asked_for(hub):
    import datasets

    commit, other = "a" * 40, "b" * 40
    hub.answer = datasets.Dataset.from_list(rows_of(TODAY))
    url = f"hf://datasets/{HUB}@{commit}/data/train.jsonl"
    hub.answer.info.download_checksums = {url: {"num_bytes": 1, "checksum": None}}
    assert read_harmful(HUB).source["revision"] == commit
    assert read_harmful(HUB, revision=commit).source["revision"] == commit
    assert other in error_of(read_harmful, HUB, revision=other)


def hub_errors():
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    broken_file = DatasetGenerationError("An error occurred while generating the dataset")
    broken_file.__cause__ = ValueError("Not a JSON file\nsecond line")
    return [
        (ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"), "HF_HUB_OFFLINE"),
        (TimeoutError(), "connection"),
        (DatasetNotFoundError("Dataset 'x' is gated.\nVisit the page."), "HF_TOKEN"),
        (DatasetNotFoundError("Revision 'r' doesn't exist for dataset 'x' on the Hub."), "revision"),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), "['train']"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "scripts"),
        (broken_file, "Not a JSON file"),
    ]


@pytest.mark.parametrize("error, says", hub_errors())
def test_hub_errors(error, says, hub):
    hub.answer = error
    message = error_of(read_harmful, HUB)
    assert says in message and "--harmful_dataset" in message and HUB in message
    message = error_of(read_normal, "truthfulqa/truthful_qa", 0)
    assert says in message and "--normal_dataset" in message


def test_a_full_disk_stays_a_full_disk(hub):
    hub.answer = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        read_harmful(HUB)


def test_a_bug_stays_a_bug(hub):
    hub.answer = AttributeError("x")
    with pytest.raises(AttributeError):
        read_harmful(HUB)


@pytest.mark.parametrize(
    "call", [f"read_harmful({HUB!r}, 'main')", "read_normal('truthfulqa/truthful_qa', 0)", "read_harmful('nosuch')"]
)
def test_offline_hub_for_real(call, tmp_path):
    code = (
        "import sys\nfrom harmful_unlearn.data.pku_saferlhf import read_harmful\n"
        "from harmful_unlearn.data.truthfulqa import read_normal\n"
        f"from harmful_unlearn.cli import exit_code\nsys.exit(exit_code(lambda: {call}))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_DATASETS_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "HF_HUB_OFFLINE" in done.stderr


def test_files_import_neither_datasets_nor_torch():
    code = (
        "import sys\nfrom harmful_unlearn.data.pku_saferlhf import read_harmful\n"
        "from harmful_unlearn.data.truthfulqa import read_normal\n"
        f"read_harmful({str(TODAY)!r}); read_normal({str(TRUTHFUL)!r}, 0)\n"
        "assert not {'datasets', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


# ---------------------------------------------------------------------------------- normal texts


def test_normal_equals_golden(golden, decode):
    read = read_normal(TRUTHFUL, 8888)
    texts = [format_pair(pair.question, pair.answer) for pair in read.texts]
    assert texts == [decode(ids) for ids in golden["normal_examples"]]
    assert [len(read.train), len(read.validation), len(read.test)] == golden["normal_split_sizes"]
    assert sorted(read.train + read.validation + read.test) == list(range(24))
    assert read.source["rows"] == 12 and read.source["texts"] == 24
    json.dumps(read.source)


@pytest.mark.parametrize("texts, sizes", [(817 * 2, (1143, 163, 328)), (2, (1, 0, 1)), (10, (7, 1, 2))])
def test_split_sizes(texts, sizes, tmp_path):
    rows = [{"question": f"q{i}", "best_answer": "a", "correct_answers": "b"} for i in range(texts // 2)]
    read = read_normal(write(tmp_path, rows), 1)
    assert (len(read.train), len(read.validation), len(read.test)) == sizes
    assert all(type(index) is int for index in read.train)


def test_split_depends_on_the_seed_alone():
    first, same, other = (read_normal(TRUTHFUL, seed) for seed in (1, 1, 2))
    assert first.train == same.train and first.test == same.test
    assert sorted(first.train) != sorted(other.train)
    assert sorted(first.train) != first.train, "random, not the file's first 70 %"


def truthful() -> pd.DataFrame:
    return pd.read_csv(TRUTHFUL, dtype=str, keep_default_na=False)


def test_normal_by_name_whatever_else_is_there(tmp_path):
    expected = read_normal(TRUTHFUL, 0)
    frame = truthful()
    frame.insert(4, "Best Incorrect Answer", "wrong")
    frame = frame[frame.columns[::-1]]
    frame.to_csv(tmp_path / "today.csv", index=False, encoding="utf-8-sig")
    frame.columns = [name.upper().replace(" ", "_") for name in frame.columns]
    frame.to_parquet(tmp_path / "own.parquet")
    frame.to_json(tmp_path / "own.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "own.json", orient="records")
    for name in ("today.csv", "own.parquet", "own.jsonl", "own.json"):
        read = read_normal(str(tmp_path / name), 0)
        assert (read.texts, read.train, read.test) == (expected.texts, expected.train, expected.test)


def test_normal_from_the_hub(hub):
    import datasets

    frame = truthful()
    hub.answer = datasets.Dataset.from_list(
        [
            {
                "question": entry["Question"],
                "best_answer": entry["Best Answer"],
                "correct_answers": entry["Correct Answers"].split("; "),
                "incorrect_answers": ["x"],
            }
            for entry in frame.to_dict("records")
        ]
    )
    assert read_normal("truthfulqa/truthful_qa", 3).texts == read_normal(TRUTHFUL, 3).texts
    assert hub.call == (("truthfulqa/truthful_qa", "generation"), {"revision": None, "split": "validation"})
    read_normal("someone/else", 3)
    assert hub.call == (("someone/else", None), {"revision": None, "split": "train"})


def test_lists_of_answers_in_a_parquet_file(tmp_path):
    rows = [{"question": "q", "best_answer": "a", "correct_answers": ["a", "b; c"]}]
    assert read_normal(write(tmp_path, rows, "parquet"), 0).texts == [Pair("q", "a"), Pair("q", "a; b; c")]


def test_empty_cells_keep_their_row(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('Question,Best Answer,Correct Answers\n"two\nlines",,"a; b"\n"",x,\nq3,None\n')
    questions = ["two\nlines", "", "q3"]
    answers = ["", "x", "None", "a; b", "", ""]
    expected = [Pair(question, answer) for question, answer in zip(questions * 2, answers, strict=True)]
    assert read_normal(path, 0).texts == expected


# ------------------------------------------------------------------------------- order of batches


def order_of(**changes) -> BatchSampler:
    usual = {"pairs": 14, "normal": range(100, 116), "answers": 14, "batch_size": 2, "k_random": 5, "seed": 7}
    return BatchSampler(**{**usual, **changes})


def test_harmful_rows_equal_golden(golden):
    order = order_of()
    assert order.batches_per_epoch == 7
    for recorded in golden["trajectory"]:
        draw = order[recorded["step"]]
        assert draw.harmful_rows == recorded["harmful_rows"]
        assert len(draw.normal_rows) == len(recorded["normal_rows"])
        assert len(draw.answer_rows) == len(recorded["random_answer_rows"])


@pytest.mark.parametrize("all_harmful", [False, True])
def test_order_is_a_function_of_the_step(all_harmful):
    forwards = [order_of(all_harmful=all_harmful)[step] for step in range(60)]
    order = order_of(all_harmful=all_harmful)
    backwards = [order[step] for step in reversed(range(60))][::-1]
    assert forwards == backwards and order[33] == forwards[33]
    for draw in forwards:
        assert all(type(index) is int for rows in vars(draw).values() for index in rows)


def test_released_epochs():
    """The full TruthfulQA file: 572 batches, of which the last has one text (points 6 and 7)."""
    order = order_of(pairs=5000, normal=range(1143), answers=5000)
    assert order.batches_per_epoch == 572
    epochs = [[order[epoch * 572 + batch] for batch in range(572)] for epoch in range(3)]
    shuffles = []
    for epoch in epochs:
        assert [index for draw in epoch for index in draw.harmful_rows] == list(range(1144))
        shuffles.append([index for draw in epoch for index in draw.normal_rows])
        assert sorted(shuffles[-1]) == list(range(1143)), "each training text once an epoch"
        assert [len(draw.normal_rows) for draw in epoch] == [2] * 571 + [1]
    assert shuffles[0] != shuffles[1] != shuffles[2] and shuffles[0] != sorted(shuffles[0])


def test_fewer_harmful_than_normal():
    order = order_of(pairs=5, normal=range(40))
    assert order.batches_per_epoch == 3
    assert [order[step].harmful_rows for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]
    epochs = [[i for b in range(3) for i in order[3 * e + b].normal_rows] for e in range(200)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert set(sum(epochs, [])) == set(range(40)), "a new shuffle each epoch reaches every text"


def test_all_harmful_cycles_each_side_by_itself():
    order = order_of(pairs=7, normal=[3, 1, 4, 15, 9], batch_size=2, all_harmful=True)
    assert order.batches_per_epoch == 4
    draws = [order[step] for step in range(24)]
    assert sum((draw.harmful_rows for draw in draws), []) == list(range(7)) * 6
    for start in range(0, 24, 3):
        rows = sum((draw.normal_rows for draw in draws[start : start + 3]), [])
        assert sorted(rows) == [1, 3, 4, 9, 15]
    assert order_of(pairs=5000, normal=range(11), all_harmful=True)[2499].harmful_rows == [4998, 4999]


def test_one_batch_holds_all():
    order = order_of(pairs=3, normal=[8, 9], batch_size=10)
    assert order[5].harmful_rows == [0, 1, 2] and sorted(order[5].normal_rows) == [8, 9]


def test_answers_are_distinct_uniform_and_anew_each_step():
    order = order_of(answers=14, k_random=5)
    draws = [order[step].answer_rows for step in range(4000)]
    assert all(len(set(rows)) == 5 and set(rows) <= set(range(14)) for rows in draws)
    counts = np.bincount(np.concatenate(draws), minlength=14)
    assert abs(counts / (4000 * 5 / 14) - 1).max() < 0.1
    assert len({tuple(rows) for rows in draws}) > 3900
    assert sorted(order_of(answers=5)[0].answer_rows) == [0, 1, 2, 3, 4]


def test_seed_changes_shuffles_and_answers():
    a, b = order_of(seed=1)[0], order_of(seed=2)[0]
    assert a.harmful_rows == b.harmful_rows
    assert a.normal_rows != b.normal_rows and a.answer_rows != b.answer_rows


def test_too_few_answers():
    message = error_of(order_of, answers=4)
    assert "--k_random" in message and "at most 4" in message


# ---------------------------------------------------------------------------------- make data


@pytest.fixture(scope="module")
def fetcher():
    spec = importlib.util.spec_from_file_location("fetcher", ROOT / "dataloader" / "fetch_truthfulqa.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server():
    """A local stand-in for the download: good, 404, garbage, truncated, stalled, ... by path."""
    good = TRUTHFUL.read_bytes()
    released = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            kind = self.path.strip("/")
            if kind == "404":
                return self.send_error(404)
            body = {
                "garbage": bytes(range(256)) * 9,
                "html": b"<html>\n<p>Sign in, please</p>\n</html>\n",
                "empty": b"",
                "columns": b"Question,Answer\nq,a\n",
                "huge": b"x" * 3000,
            }.get(kind, good)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if kind in ("truncated", "stalled"):
                # Cut after a whole row: what came would pass for a good file.
                body = body[: body.rindex(b"\n", 0, -1) + 1]
            self.wfile.write(body)
            if kind == "stalled":
                self.wfile.flush()
                released.wait(20)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(fetcher, tmp_path, monkeypatch, capsys):
    """Run the command on a folder of its own: (exit code, stderr)."""
    monkeypatch.setattr(fetcher, "HERE", tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["fetch_truthfulqa.py", "--timeout", "0.5", *flags])
        return fetcher.exit_code(fetcher.main), capsys.readouterr().err

    return run


def test_fetch(run, server, tmp_path):
    assert run("--url", f"{server}/good") == (0, "")
    assert (tmp_path / "TruthfulQA.csv").read_bytes() == TRUTHFUL.read_bytes()
    assert os.listdir(tmp_path) == ["TruthfulQA.csv"]
    # A good file is kept without asking the server; a broken one is replaced.
    assert run("--url", f"{server}/404") == (0, "")
    (tmp_path / "TruthfulQA.csv").write_text("no,thing\n")
    assert run("--url", f"{server}/good") == (0, "")
    assert (tmp_path / "TruthfulQA.csv").read_bytes() == TRUTHFUL.read_bytes()


@pytest.mark.parametrize(
    "kind, says",
    [
        ("404", "404"),
        ("garbage", "no TruthfulQA.csv"),
        ("html", "no TruthfulQA.csv"),
        ("empty", "no TruthfulQA.csv"),
        ("columns", "no TruthfulQA.csv"),
        ("truncated", "bytes"),
        ("stalled", "timed out"),
        ("huge", "more than"),
    ],
)
@pytest.mark.parametrize("existing", [True, False])
def test_failed_fetch_leaves_all_as_it_was(kind, says, existing, run, server, tmp_path, fetcher, monkeypatch):
    if existing:
        (tmp_path / "TruthfulQA.csv").write_bytes(TRUTHFUL.read_bytes())
    if kind == "huge":
        monkeypatch.setattr(fetcher, "MAX_BYTES", 2999)
    started = time.monotonic()
    code, error = run("--force", "--url", f"{server}/{kind}")
    assert code == 2 and error.count("\n") == 1 and says in error and f"{server}/{kind}" in error
    assert time.monotonic() - started < 10
    assert os.listdir(tmp_path) == (["TruthfulQA.csv"] if existing else [])
    if existing:
        assert (tmp_path / "TruthfulQA.csv").read_bytes() == TRUTHFUL.read_bytes()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "nonsense", "http://[/x", "file:///no/such"]
)
def test_fetch_from_nowhere(url, run):
    code, error = run("--url", url)
    assert code == 2 and error.count("\n") == 1 and "--url" in error


def test_fetch_into_a_read_only_folder(run, server, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)  # root may write into any folder
    code, error = run("--url", f"{server}/good")
    assert code == 2 and "not writable" in error


def test_fetch_is_a_command_that_runs_from_anywhere(tmp_path):
    script = ROOT / "dataloader" / "fetch_truthfulqa.py"
    done = subprocess.run(
        [sys.executable, str(script), "--force", "--url", "http://127.0.0.1:9/x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "no_proxy": "127.0.0.1"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
