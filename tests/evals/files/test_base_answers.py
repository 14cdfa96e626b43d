"""The base's answers for later evaluations: used where nothing differs, remade where they are broken."""

from dataclasses import replace

import pytest

from harmful_unlearn.data.truthfulqa import Choices
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.files.base_answers import BaseAnswers, folder_of
from harmful_unlearn.evals.inference.generation import Decoding
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.evals.protocol import EvalProtocol
from harmful_unlearn.storage import files

PROTOCOL = EvalProtocol({"normal": [Prompt("Why?", "So.", 3)]}, [Decoding()], 8, 100, 3, {})
BASE = EvaluatedModel("base", {"fingerprint": "a"}, lambda: pytest.fail("loaded"))
KEPT = BaseAnswers([{"index": 0, "answer": "Só"}], {"normal": [[1.5, 2]]})


def test_what_is_written_is_read(tmp_path):
    assert BaseAnswers.read(tmp_path / "kept") is None
    for _ in range(2):
        KEPT.write(tmp_path / "kept")
        assert BaseAnswers.read(tmp_path / "kept") == KEPT
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("file", ["base.json", "base.json.sha256"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b"\xff"])
def test_broken_files_are_as_none(file, content, tmp_path):
    KEPT.write(tmp_path / "kept")
    (tmp_path / "kept" / file).write_bytes(content)
    assert BaseAnswers.read(tmp_path / "kept") is None
    KEPT.write(tmp_path / "kept")
    assert BaseAnswers.read(tmp_path / "kept") == KEPT


def test_a_process_that_comes_second_does_no_harm(tmp_path, monkeypatch):
    """The other one writes the same between the check and the renaming."""
    check = files.check_target

    def then_the_other(target, overwrite):
        check(target, overwrite)
        monkeypatch.setattr(files, "check_target", check)
        KEPT.write(tmp_path / "kept")

    monkeypatch.setattr(files, "check_target", then_the_other)
    KEPT.write(tmp_path / "kept")
    assert BaseAnswers.read(tmp_path / "kept") == KEPT


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    KEPT.write(tmp_path / "file" / "kept")
    assert BaseAnswers.read(tmp_path / "file" / "kept") is None


@pytest.mark.parametrize(
    "protocol, model",
    [
        (replace(PROTOCOL, seed=4), BASE),
        (replace(PROTOCOL, backend="vllm"), BASE),
        (replace(PROTOCOL, precision="bf16"), BASE),
        (replace(PROTOCOL, prompts={"normal": [Prompt("Why?", "No.", 3)]}), BASE),
        (replace(PROTOCOL, choices={"Why?": Choices("So.", ["So."], ["No."])}), BASE),
        (PROTOCOL, replace(BASE, identity={"fingerprint": "b"})),
    ],
)
def test_what_decides_an_answer_decides_the_folder(protocol, model, tmp_path):
    assert folder_of(tmp_path, protocol, model) != folder_of(tmp_path, PROTOCOL, BASE)
    faster = replace(PROTOCOL, tokens_per_batch=5)
    assert folder_of(tmp_path, faster, replace(BASE, label="other")) == folder_of(tmp_path, PROTOCOL, BASE)
