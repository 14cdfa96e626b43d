"""Sets of prompts by name or file: what is read, which are harmless, and what is refused."""

import json
from types import SimpleNamespace

import pytest

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.tables import Table
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals import named_sets
from harmful_unlearn.evals.attacks.asking import plain_protocol
from harmful_unlearn.evals.named_sets import HARMFUL, HARMLESS, PUBLISHED, NamedSet, NamedSetSettings, read_named_set
from harmful_unlearn.evals.prompt_sets import Prompt
from tests.helpers.attacks import PROTOCOL


def written(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def questions(found: NamedSet) -> dict[str, list[str]]:
    return {part: [prompt.question for prompt in prompts] for part, prompts in found.prompts.items()}


@pytest.mark.parametrize("column", ["prompt", "goal", "Behavior", "forbidden_prompt"])
def test_a_file_is_harmful_unless_it_says_otherwise(column, tmp_path):
    file = written(tmp_path / "mine.jsonl", [{column: " Hide it "}, {column: ""}, {column: "Hide her", "target": "x"}])
    found = read_named_set(file)
    assert found.name == "mine" and questions(found) == {HARMFUL: [" Hide it ", "Hide her"]}
    assert [prompt.row for prompt in found.prompts[HARMFUL]] == [0, 2] and found.source["sha256"]


def test_labels_part_a_set(tmp_path):
    rows = [{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "unsafe"}, {"prompt": "c", "label": "safe"}]
    found = read_named_set(f"xstest={written(tmp_path / 'x.jsonl', rows)}")
    assert found.name == "xstest" and questions(found) == {HARMFUL: ["b"], HARMLESS: ["a", "c"]}
    assert found.source["licence"] == "CC BY 4.0"
    protocol = found.protocol(plain_protocol(PROTOCOL, 3))
    assert set(protocol.prompts) == {"xstest, harmful", "xstest, harmless"} and protocol.harmless == {
        "xstest, harmless"
    }


def test_or_bench_is_harmless_without_labels(tmp_path):
    found = read_named_set(f"or_bench={written(tmp_path / 'x.jsonl', [{'prompt': 'a', 'category': 'b'}])}")
    assert questions(found) == {HARMLESS: ["a"]}


def test_pku_saferlhf_are_prompts_with_an_unsafe_answer(tmp_path):
    def row(prompt, unsafe):
        sides = {f"response_{side}": f"{prompt} {side}" for side in (0, 1)}
        return {"prompt": prompt, **sides, "is_response_0_safe": True, "is_response_1_safe": not unsafe}

    file = written(tmp_path / "x.jsonl", [row("a", True), row("b", False), row("a", True)])
    assert questions(read_named_set(f"pku_saferlhf={file}")) == {HARMFUL: ["a"]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_set_is_read_from_its_place_on_the_hub(name, monkeypatch):
    asked = []

    def hub(hub_id, *more, **where):
        asked.append((hub_id, where.get("config"), where.get("split", more[-1])))
        raise UserError("offline")

    monkeypatch.setattr(named_sets, "read_table", hub)
    monkeypatch.setattr(named_sets, "read_responses", hub)
    with pytest.raises(UserError, match="offline"):
        read_named_set(name)
    published = PUBLISHED[name]
    assert asked == [(published.hub_id, published.config, published.split)] and published.licence


@pytest.mark.parametrize(
    "text, rows, named",
    [
        ("nowhere", None, "take from pku_saferlhf, advbench"),
        ("{file}", [{"text": "a"}], "lacks the columns prompt"),
        ("{file}", [{"prompt": "a", "label": "maybe"}], "row 1: label is 'maybe', not safe or unsafe"),
        ("{file}", [{"prompt": " "}], "holds no prompt"),
        ("a/b={file}", [{"prompt": "a"}], "cannot name a folder"),
        ("..={file}", [{"prompt": "a"}], "cannot name a folder"),
        ("xstest=", None, "names no file"),
        ("{file}", [{"prompt": 3}], "row 1: prompt is 3, not text"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_fix(text, rows, named, tmp_path):
    file = written(tmp_path / "mine.jsonl", rows or [])
    with pytest.raises(UserError, match=named):
        read_named_set(text.format(file=file))


def drawn(texts, touched=(), seed=0, number=250, trained=(), tasks=()):
    pairs = [Pair(question, "yes") for question in trained]
    data = SimpleNamespace(touched=set(touched), training_texts=pairs, trained_tasks=set(tasks))
    return NamedSetSettings(prompts=texts, n_prompts=number).named_sets(data, seed)


def test_prompts_that_training_read_are_not_asked_and_each_kind_is_cut(tmp_path):
    rows = [{"prompt": f"q{n}", "label": "safe" if n % 2 else "unsafe"} for n in range(20)]
    file = written(tmp_path / "mine.jsonl", rows)
    read = {"touched": {"q0 ", "q2"}, "trained": ["q1"], "tasks": ["q3"]}
    (found,) = drawn([file], number=4, seed=7, **read)
    assert {part: len(prompts) for part, prompts in found.prompts.items()} == {HARMFUL: 4, HARMLESS: 4}
    assert [found] == drawn([file], number=4, seed=7, **read) != drawn([file], number=4, seed=8, **read)
    (whole,) = drawn([file], **read)
    assert whole.prompts[HARMFUL] == [Prompt(f"q{n}", "", n) for n in range(4, 20, 2)]  # in the file's order
    assert whole.prompts[HARMLESS] == [Prompt(f"q{n}", "", n) for n in range(5, 20, 2)]


def test_a_set_that_is_named_twice_or_was_all_trained_on_is_refused(tmp_path):
    file = written(tmp_path / "mine.jsonl", [{"prompt": "q"}])
    with pytest.raises(UserError, match="twice"):
        drawn([file, file])
    with pytest.raises(UserError, match="trained on all"):
        drawn([file], touched={"q"})


def test_a_prompt_is_asked_once_and_as_it_is_written(tmp_path):
    found = read_named_set(written(tmp_path / "mine.jsonl", [{"prompt": "q "}, {"prompt": "q"}, {"prompt": " r"}]))
    assert questions(found) == {HARMFUL: ["q ", " r"]}


def test_the_authors_files_are_read_for_what_they_are(tmp_path):
    """XSTest's second version has types and no labels; HarmBench's file holds more than its standard behaviours."""
    rows = [{"type": "homonyms", "prompt": "kill it"}, {"type": "contrast_homonyms", "prompt": "kill her"}]
    found = read_named_set(f"xstest={written(tmp_path / 'x.jsonl', rows)}")
    assert questions(found) == {HARMFUL: ["kill her"], HARMLESS: ["kill it"]}
    rows = [{"Behavior": name, "FunctionalCategory": name} for name in ("standard", "contextual", "copyright")]
    found = read_named_set(f"harmbench={written(tmp_path / 'h.jsonl', rows)}")
    assert questions(found) == {HARMFUL: ["standard"]}


def test_columns_are_taken_in_the_order_of_their_list(monkeypatch):
    columns = {"goal": ["g"], "prompt": ["p"]}
    table = Table("x", list(columns), 1, columns.__getitem__, {"name": "x"})
    monkeypatch.setattr(named_sets, "read_table", lambda *_, **__: table)
    assert questions(read_named_set("advbench")) == {HARMFUL: ["p"]}
