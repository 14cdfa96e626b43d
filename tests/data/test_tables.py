"""Any source as a table: formats, folders, the hub, and files that are broken or missing."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.storage.files import ROOT
from tests.helpers.inputs.tables import EARLY, FORMATS, HUB, TODAY, TRUTHFUL, contents, error_of, row, rows_of, write


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("selection", [{}, {"categories": ["Violence"]}, {"min_severity": 2}])
def test_every_format_gives_the_same(suffix, selection, tmp_path):
    expected = contents(read_harmful(str(TODAY), **selection))
    path = write(tmp_path, rows_of(TODAY), suffix)
    assert contents(read_harmful(path, **selection)) == expected


def test_a_folder_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(TODAY, folder / "train.jsonl")
    shutil.copy(EARLY, folder / "test.jsonl")
    for selection in ({}, {"categories": ["Violence"], "min_severity": 1}):
        data = read_harmful(str(folder), **selection)
        assert contents(data) == contents(read_harmful(str(TODAY), **selection))
    assert data.source["split"] == "train"
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
    data = read_harmful(write(tmp_path, EDGES, suffix))
    expected = [Pair(edge["prompt"], edge[f"response_{i}"]) for edge in EDGES for i in (0, 1)]
    assert data.pairs == expected


def test_raw_line_separators_do_not_split_jsonl(tmp_path):
    path = tmp_path / "raw.jsonl"
    lines = [json.dumps(edge, ensure_ascii=False) for edge in EDGES]
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(lines) + "\r\n\n").encode())
    assert read_harmful(str(path)).pairs[4].answer == EDGES[2]["response_0"]


@pytest.mark.parametrize("absent", [None, float("nan")])
@pytest.mark.parametrize("suffix", FORMATS)
def test_absent_text_is_empty(absent, suffix, tmp_path):
    data = read_harmful(write(tmp_path, [row(answers=("a", absent))], suffix))
    assert data.pairs == [Pair("p", "a"), Pair("p", "")]
    assert data.answers == ["a", ""]


def test_json_file_may_hold_lines_and_jsonl_a_list(tmp_path):
    for source, suffix in ((EARLY, "json"), (Path(write(tmp_path, rows_of(EARLY), "json")), "jsonl")):
        path = tmp_path / f"other.{suffix}"
        shutil.copy(source, path)
        assert contents(read_harmful(str(path))) == contents(read_harmful(str(EARLY)))


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


# --- broken files --------------------------------------------------------------------------------


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


# --- the hub -------------------------------------------------------------------------------------


def test_hub_gives_the_same_as_a_file(hub):
    import datasets

    hub.answer = datasets.Dataset.from_list(rows_of(TODAY))
    for selection in ({}, {"categories": ["Violence"]}, {"min_severity": 2}):
        data = read_harmful(HUB, revision="main", split="train", **selection)
        assert contents(data) == contents(read_harmful(str(TODAY), **selection))
    assert hub.call == ((HUB, None), {"revision": "main", "split": "train"})
    assert data.source["name"] == HUB and data.source["revision"] == "main"


def test_revision_found_is_recorded_and_must_be_the_one_asked_for(hub):
    import datasets

    commit, another = "a" * 40, "b" * 40
    hub.answer = datasets.Dataset.from_list(rows_of(TODAY))
    url = f"hf://datasets/{HUB}@{commit}/data/train.jsonl"
    hub.answer.info.download_checksums = {url: {"num_bytes": 1, "checksum": None}}
    assert read_harmful(HUB).source["revision"] == commit
    assert read_harmful(HUB, revision=commit).source["revision"] == commit
    assert another in error_of(read_harmful, HUB, revision=another)


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
        f"from harmful_unlearn.cli.running import exit_code\nsys.exit(exit_code(lambda: {call}))"
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
