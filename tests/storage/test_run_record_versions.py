"""run.json files that earlier versions wrote (tests/goldens/run_records, version 0, commit e3bfbe3) still load."""

import json
import shutil

import pytest

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.run_record import VERSION, RunRecord, read_trainings, training_digest
from tests.helpers.models.tiny import GOLDENS

RECORDS = sorted((GOLDENS / "run_records").glob("*.json"))
TEMPLATE = "### Question: {question}\n ### Answer: {answer}"


@pytest.fixture
def folder_of(tmp_path):
    """`folder_of("sku-harmful")`: a folder with that run.json."""

    def make(name: str):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(GOLDENS / "run_records" / f"{name}.json", folder / "run.json")
        return folder

    return make


@pytest.mark.parametrize("name", [path.stem for path in RECORDS])
def test_nothing_is_lost_in_reading_and_writing(name, folder_of):
    folder = folder_of(name)
    before = json.loads((folder / "run.json").read_text())
    RunRecord.read(folder).write(folder)
    after = json.loads((folder / "run.json").read_text())
    provenance = {"command", "code", "packages", "python", "created", "harmful_if_subtracted"}
    assert after.pop("record_version") == VERSION

    def missing(old, new, path=""):
        for key, value in old.items():
            if key in provenance and not path:
                continue
            if isinstance(value, dict) and value:
                yield from missing(value, new.get(key, {}), f"{path}/{key}")
            elif value != new.get(key):
                yield f"{path}/{key}"

    assert not list(missing(before, after))
    assert RunRecord.read(folder) == RunRecord.read(folder)


@pytest.mark.parametrize(
    "name, negates, landing_alpha",
    [("sku-harmful", True, None), ("lands-harmful", True, 4.0), ("ga-harmful", False, None)],
)
def test_facts_are_taken_from_the_flags_of_before(name, negates, landing_alpha, folder_of):
    record = RunRecord.read(folder_of(name))
    assert (record.negates, record.landing_alpha, record.prompt_template) == (negates, landing_alpha, TEMPLATE)
    assert record.method == name.split("-")[0] and record.training["steps"] == 3
    assert record.harmful is negates and record.base["name"] == "goldens/model"


@pytest.mark.parametrize(
    "name, methods", [("sku-unlearned", ["sku"]), ("two-vector", ["sku", "lands"]), ("lora-adapter", ["sku"])]
)
def test_trainings_are_found_in_what_was_made_of_them(name, methods, folder_of):
    folder = folder_of(name)
    assert [run.method for run in read_trainings(folder)] == methods
    record = RunRecord.read(folder)
    assert record.is_complete and record not in record.trainings and len(record.stage_1) == len(methods)
    assert list(record.finetuned) == [f"{'lora' if name == 'lora-adapter' else method}/harmful" for method in methods]
    assert training_digest(folder) and training_digest(folder.parent) is None


def test_a_vector_keeps_what_each_of_its_models_was_trained_for(folder_of):
    assert [run.landing_alpha for run in RunRecord.read(folder_of("two-vector")).stage_1] == [None, 4.0]


def test_a_digest_that_was_kept_stays_valid(folder_of):
    """evaluation.py remembers models by it (protocol.json)."""
    digest = training_digest(folder_of("sku-unlearned"))
    assert digest == "9804e427730ef3df39918c6428a282f8e5ffa7cac02c53151cc08b15946ae928"


@pytest.mark.parametrize("version", [2, "1", None, []])
def test_a_record_of_a_newer_version_says_so(version, folder_of):
    folder = folder_of("sku-harmful")
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, "record_version": version}))
    with pytest.raises(UserError, match="newer version.*update this project"):
        RunRecord.read(folder)
