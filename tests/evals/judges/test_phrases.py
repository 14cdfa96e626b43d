"""Judges by phrases, and all judges of refusals."""

import pytest

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.judges import hub
from harmful_unlearn.evals.judges.phrases import OPENINGS
from harmful_unlearn.evals.judges.registry import judge_name, make_refusal_judge, refusal_judge_name
from harmful_unlearn.evals.judges.server import REFUSAL, few_shot, read_verdict
from tests.helpers.judges import CPU, make, serving


def verdicts(judge, *answers):
    return [verdict.yes for verdict in judge.judge([Pair("How do I keep bread fresh?", answer) for answer in answers])]


@pytest.fixture
def refusals(tmp_path):
    return make_refusal_judge("phrases", tmp_path / "cache", CPU)


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_published_opening_is_a_refusal(opening, refusals):
    assert verdicts(refusals, f"{opening} x", f"  {opening.upper()},\nno", f"Well. {opening}") == [True, True, False]


def test_apostrophes_and_line_breaks_do_not_matter(refusals):
    assert verdicts(refusals, "I\u2019m  sorry", "I\ncan\u2019t", "Wrap it in a cloth.", "I sorry") == [
        True,
        True,
        False,
        False,
    ]


def test_refusals_in_other_words_are_not_found(refusals):
    """The known error of a list of openings: it stays an error."""
    assert verdicts(refusals, "That would be wrong, so no.", "I do not need sugar for this bread:") == [False, True]


def test_own_phrases_are_harmful_anywhere(tmp_path):
    file = tmp_path / "phrases.txt"
    file.write_text("bury it\n\n  plug the drain \n")
    judge = make(f"phrases:{file}")
    assert verdicts(judge, "Then Bury  it deep.", "plug the\ndrain", "plug the sink", "") == [True, True, False, False]
    own = make_refusal_judge(f"phrases:{file}", tmp_path, CPU)
    assert verdicts(own, "Bury it", "Then bury it") == [True, False]
    file.write_text("bury it")
    assert make(f"phrases:{file}").facts != judge.facts  # judges again


@pytest.mark.parametrize("content", [None, "", " \n", b"\xff"])
def test_a_file_without_phrases_is_refused(content, tmp_path):
    file = tmp_path / "phrases.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="one phrase a line"):
        make(f"phrases:{file}")


@pytest.mark.parametrize("text", ["classifier", "finetuned:x", "hf", "openai:", "phrases:"])
def test_other_judges_do_not_know_refusals(text):
    with pytest.raises(UserError, match="give phrases"):
        refusal_judge_name(text)
    assert refusal_judge_name("hf:x") and judge_name("phrases:x")


def test_a_classifier_of_refusals_has_to_be_in_the_table(tmp_path):
    with pytest.raises(UserError, match="protectai/distilroberta-base-rejection-v1"):
        make_refusal_judge("hf:some/model", tmp_path, CPU)
    assert all(spec.yes for spec in hub.REFUSAL_JUDGES.values())


@pytest.mark.parametrize(
    "reply, refused", [("REFUSED", True), ("answered.", False), ("HARMFUL", None), ("refuse", None)]
)
def test_a_server_is_asked_for_refusals_in_other_words(reply, refused):
    assert read_verdict(reply, REFUSAL) is refused
    turns = few_shot(Pair("Why?", "No."), REFUSAL)
    assert "REFUSED or ANSWERED" in turns[0]["content"] and turns[-1]["content"].endswith("Answer: No.\nVerdict:")
    said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert all(read_verdict(word, REFUSAL) is not None for word in said) and len(set(said)) == 2


def test_the_servers_verdicts_on_harm_and_refusals_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    cache = tmp_path / "cache.jsonl"
    with serving() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        refusal = make_refusal_judge("openai:tiny", cache, CPU)
        assert [v.yes for v in refusal.judge([Pair("REFUSED", "x"), Pair("ANSWERED", "x")])] == [True, False]
        harm = make("openai:tiny", cache)
        assert [v.yes for v in harm.judge([Pair("REFUSED", "x"), Pair("SAFE", "x")])] == [None, False]
        asked = len(server.requests)
        assert [v.yes for v in refusal.judge([Pair("REFUSED", "x"), Pair("ANSWERED", "x")])] == [True, False]
        assert len(server.requests) == asked and refusal.facts != harm.facts
