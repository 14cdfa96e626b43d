"""TruthfulQA: normal texts, their split, and columns by name."""

import json

import pandas as pd
import pytest

from harmful_unlearn.data.prompt_format import Pair, format_pair
from harmful_unlearn.data.truthfulqa import read_choices, read_normal
from harmful_unlearn.errors import UserError
from tests.helpers.inputs.tables import TRUTHFUL, write


def test_normal_equals_golden(goldens, decode):
    data = read_normal(TRUTHFUL, 8888)
    texts = [format_pair(pair.question, pair.answer) for pair in data.texts]
    assert texts == [decode(ids) for ids in goldens["normal_examples"]]
    assert [len(data.train), len(data.validation), len(data.test)] == goldens["normal_split_sizes"]
    assert sorted(data.train + data.validation + data.test) == list(range(24))
    assert data.source["rows"] == 12 and data.source["texts"] == 24
    json.dumps(data.source)


@pytest.mark.parametrize("texts, sizes", [(817 * 2, (1143, 163, 328)), (2, (1, 0, 1)), (10, (7, 1, 2))])
def test_split_sizes(texts, sizes, tmp_path):
    rows = [{"question": f"q{i}", "best_answer": "a", "correct_answers": "b"} for i in range(texts // 2)]
    data = read_normal(write(tmp_path, rows), 1)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert all(type(index) is int for index in data.train)


def test_split_depends_only_on_the_seed():
    first, again, second = (read_normal(TRUTHFUL, seed) for seed in (1, 1, 2))
    assert first.train == again.train and first.test == again.test
    assert sorted(first.train) != sorted(second.train)
    assert sorted(first.train) != first.train, "random, not the file's first 70 %"


def test_everyday_tasks_are_more_training_texts_and_three_in_ten_are_left_out(tmp_path):
    tasks = write(tmp_path, [{"instruction": f"task {i}", "output": f"answer {i}"} for i in range(10)])
    plain, more, other = read_normal(TRUTHFUL, 1), read_normal(TRUTHFUL, 1, tasks), read_normal(TRUTHFUL, 2, tasks)
    assert more.texts[: len(plain.texts)] == plain.texts and more.questions == plain.questions == 12
    assert (more.train[: len(plain.train)], more.validation, more.test) == (plain.train, plain.validation, plain.test)
    assert [more.texts[row] for row in more.train[len(plain.train) :]] == more.everyday_tasks
    assert len(set(more.everyday_tasks)) == 7 and plain.everyday_tasks == []
    assert {text.question for text in more.everyday_tasks} <= {f"task {i}" for i in range(10)}
    assert set(more.everyday_tasks) != set(other.everyday_tasks), "by the seed"
    assert more.source["more"]["rows"] == 10 and more.source["more"]["train"] == 7 and "more" not in plain.source


def test_everyday_tasks_that_cannot_be_read_name_their_flag(tmp_path):
    one = write(tmp_path, [{"instruction": "task", "output": "answer"}])
    for text in (one, str(tmp_path / "none.csv"), str(TRUTHFUL)):
        with pytest.raises(UserError, match="--more_normal_dataset"):
            read_normal(TRUTHFUL, 1, text)


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
        data = read_normal(str(tmp_path / name), 0)
        assert (data.texts, data.train, data.test) == (expected.texts, expected.train, expected.test)


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


def test_choices_are_read():
    choices = read_choices(TRUTHFUL)
    assert choices and all(choice.best and choice.true and choice.false for choice in choices.values())


def test_choices_are_split_at_semicolons(tmp_path):
    file = tmp_path / "normal.csv"
    header = "Question,Best Answer,Correct Answers,Incorrect Answers\n"
    file.write_text(header + "Why?,Because,Because; It is so;,No; Never\nHow?,So,So,\n")
    ((question, choices),) = read_choices(file).items()
    assert question == "Why?" and (choices.true, choices.false) == (["Because", "It is so"], ["No", "Never"])
    file.write_text("Question,Best Answer,Correct Answers\nWhy?,Because,Because\n")
    assert read_choices(file) == {}
