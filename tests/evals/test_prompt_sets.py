"""Which prompts are measured on: by prompt, apart from all that a training touched."""

from dataclasses import fields

import pytest

from harmful_unlearn.data.batch_sampler import BatchSampler
from harmful_unlearn.data.pku_saferlhf import Response, read_harmful
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import NormalData, read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.prompt_sets import DataSettings, EvalData, draw_prompts, touched_questions
from harmful_unlearn.losses.terms import reads
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.training.flags import parse_flags
from tests.helpers.inputs.tables import TRUTHFUL, write
from tests.helpers.models.tiny import GOLDENS

NUMBERS = {"seen": 200, "unseen": 200, "normal": 200, "utility": 200}
PKU = str(GOLDENS / "pku_saferlhf_current_schema.jsonl")


def normal_data(train, validation, test, questions=10):
    texts = [Pair(f"q{i}", f"best {i}") for i in range(questions)]
    texts += [Pair(f"q{i}", f"correct {i}") for i in range(questions)]
    return NormalData(texts, train, validation, test, {})


NORMAL = normal_data([0, 1, 10, 2], [3, 14, 12], [4, 5, 15, 11])
RESPONSES = [
    Response(f"h{i}", f"{side} {i}", safe, frozenset({"Kind"} if not safe else ()))
    for i in range(30)
    for side, safe in (("safe", True), ("unsafe", False))
]


TASKS = [Pair(f"task {i % 9}", f"answer {i}") for i in range(12)]


def drawn(trained, touched, numbers=NUMBERS, seed=0, unseen=RESPONSES, normal=NORMAL, responses=RESPONSES):
    return draw_prompts(EvalData(responses, unseen, normal, {}, TASKS, trained, touched, {}), numbers, seed)


def test_sets_by_prompt():
    trained, touched = {"h0", "h1"}, {"h0", "h1", "h2"}
    sets = drawn(trained, touched)
    assert {p.question for p in sets.test["seen"]} == trained
    test, validation = ({p.question for p in part["unseen"]} for part in (sets.test, sets.validation))
    assert not test & validation and not (test | validation) & touched
    assert len(test | validation) == 27 and len(validation) == 9
    assert all(p.reference == p.question.replace("h", "unsafe ") for p in sets.test["unseen"])
    assert all(RESPONSES[p.row].answer == p.reference for p in sets.test["seen"])
    assert sets.test["seen"][0].categories == {"Kind"}


def test_each_kind_of_harm_has_as_many_prompts_as_all_together():
    kinds = [
        Response(f"h{i}", f"unsafe {i}", False, frozenset({"even", "all"} if i % 2 == 0 else {"all"}))
        for i in range(30)
    ]
    sets = drawn({"h0"}, {"h0"}, {**NUMBERS, "unseen": 6}, unseen=kinds, responses=kinds)
    assert {kind: len(found) for kind, found in sets.of_category.items()} == {"all": 6, "even": 6}
    untouched = {p.question for p in sets.of_category["even"]}
    assert not untouched & {"h0", *(p.question for p in sets.validation["unseen"])}


def test_a_normal_question_is_held_out_with_both_its_texts():
    """q4 and q5 are in the test part alone; q1 has its other text in training; q4's text 14 is in validation."""
    sets = drawn({"h0"}, {"h0"})
    assert {p.question for p in sets.test["normal"]} == {"q4", "q5"}
    assert {p.reference for p in sets.test["normal"]} == {"best 4", "best 5"}
    assert {(p.question, p.reference) for p in sets.validation["normal"]} == {("q3", "best 3"), ("q2", "correct 2")}


def test_a_prompt_in_several_rows_is_one_prompt():
    doubled = RESPONSES + [Response("h3", "another answer", False)]
    sets = drawn({"h3"}, {"h3"}, responses=doubled, unseen=doubled)
    assert [p.question for p in sets.test["seen"]] == ["h3"] and sets.test["seen"][0].reference == "unsafe 3"
    assert "h3" not in {p.question for p in sets.test["unseen"] + sets.validation["unseen"]}


def test_sizes_and_seeds():
    few = {"seen": 1, "unseen": 5, "normal": 1, "utility": 1}
    one, same, other = (drawn({"h0", "h1"}, {"h0", "h1"}, few, seed) for seed in (1, 1, 2))
    assert [len(one.test[name]) for name in few] == [1, 5, 1, 1]
    assert one == same and one.test["unseen"] != other.test["unseen"]
    all_of_them = drawn({"h0", "h1"}, {"h0", "h1"}, NUMBERS, 1)
    assert all_of_them.test["unseen"][:5] == one.test["unseen"]  # a smaller size is a part of a larger


@pytest.mark.parametrize(
    "trained, touched, normal, named",
    [
        (set(), set(), NORMAL, "seen"),
        ({"h0"}, {f"h{i}" for i in range(30)}, NORMAL, "unseen_dataset"),
        ({"h0"}, {"h0"}, normal_data(list(range(10)), [], list(range(10, 20))), "normal"),
    ],
)
def test_an_empty_set_is_an_error_that_names_the_fix(trained, touched, normal, named):
    with pytest.raises(UserError, match=named):
        drawn(trained, touched, normal=normal)


@pytest.mark.parametrize(
    "losses, own, pool",
    [
        ({"gd", "rd", "pd"}, True, True),
        ({"gd"}, True, False),
        ({"rd"}, False, True),
        ({"ga", "rm", "kl"}, True, False),
        ({"ft"}, False, False),
        ({"sa"}, False, False),
    ],
)
def test_touched_is_what_the_steps_draw(losses, own, pool):
    harmful = read_harmful(PKU)
    normal = normal_data(list(range(8)), [8], [9])
    order = BatchSampler(range(len(harmful.pairs)), normal.train, len(harmful.answers), 2, 3, 5)
    trained, touched = touched_questions(order, harmful, reads(losses), 2)
    draws = [order[step] for step in (0, 1)]
    asked = {harmful.pairs[row].question for draw in draws for row in draw.harmful_rows}
    drawn_from = {harmful.answer_questions[row] for draw in draws for row in draw.answer_rows}
    assert trained == (asked if own else set())
    assert touched == (set() if losses == {"ft"} else asked) | (drawn_from if pool else set())


def test_everyday_tasks_are_asked_once_and_a_third_is_for_validation():
    sets = drawn(set(), set(), numbers={**NUMBERS, "seen": 0, "utility": 5})
    test, validation = ({prompt.question for prompt in part["utility"]} for part in (sets.test, sets.validation))
    assert len(test) == 5 and len(validation) == 3 and not test & validation
    assert all(TASKS[prompt.row] == prompt.pair for prompt in sets.test["utility"])
    none = drawn(set(), set(), numbers={**NUMBERS, "seen": 0, "utility": 0})
    assert "utility" not in none.test and "utility" not in none.validation


def record_of(more, data=None):
    """The record of a stage 1 run with everyday tasks from `more`, and from `data` as its record says."""
    words = ["--harmful_dataset", PKU, "--normal_dataset", str(TRUTHFUL), "--max_unlearn_steps", "1"]
    flags = parse_flags(words + (["--more_normal_dataset", more] if more else [])).to_json()
    normal = read_normal(TRUTHFUL, flags["seed"], data or more)
    return RunRecord(flags=flags, harmful_data=read_harmful(PKU).source, normal_data=normal.source), normal


def data_settings(**given):
    return DataSettings(**{**dict.fromkeys(field.name for field in fields(DataSettings)), **given})


def test_tasks_that_any_model_was_trained_on_are_not_asked(tmp_path):
    tasks = write(tmp_path, [{"instruction": f"task {i}", "output": f"answer {i}"} for i in range(20)])
    (with_tasks, normal), (without, _) = record_of(tasks), record_of(None)
    settings = data_settings(utility_dataset=tasks)
    data = EvalData.read(settings, [without, with_tasks])
    assert data.trained_tasks == {text.question for text in normal.everyday_tasks} and len(data.trained_tasks) == 14
    sets = draw_prompts(data, {**NUMBERS, "unseen": 0}, 0)
    asked = {prompt.question for part in (sets.test, sets.validation) for prompt in part["utility"]}
    assert asked == {f"task {i}" for i in range(20)} - data.trained_tasks
    assert EvalData.read(settings, [without]).trained_tasks == frozenset()


def test_everyday_tasks_that_are_not_the_trainings_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    one = write(tmp_path, [{"instruction": f"task {i}", "output": "answer"} for i in range(4)])
    other = write(tmp_path / "other", [{"instruction": f"other {i}", "output": "answer"} for i in range(4)])
    record, _ = record_of(one, other)
    with pytest.raises(UserError, match="--more_normal_dataset"):
        EvalData.read(data_settings(), [record])
    assert EvalData.read(data_settings(more_normal_dataset=other), [record]).trained_tasks
