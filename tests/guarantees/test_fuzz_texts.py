"""Random data files, judges' replies, messages and numbers in flags."""

import argparse
import io
import json
import math
import re
from contextlib import redirect_stderr
from dataclasses import asdict

import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harmful_unlearn.cli import flag_types
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.data.pku_saferlhf import read_harmful, read_responses
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import NORMAL_COLUMNS, read_choices, read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.files.answers import write_answers
from harmful_unlearn.evals.judges.base import Verdict
from harmful_unlearn.evals.judges.hub import GuardSpec
from harmful_unlearn.evals.judges.server import ServerJudge, read_cache, read_verdict
from tests.helpers.inputs.fuzzing import DEEP, JSON, SUFFIXES, TEXT, data_files, odd_parquet, one_row, written


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that the examples of a test write to, one after the other."""
    return tmp_path_factory.mktemp("fuzz")


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
    assert verdict.yes is read_verdict(reply)
    assert not any(secret in verdict.note for secret in SECRETS)
    assert bool(verdict.note) == (verdict.yes is None)
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


NUMBERS = st.one_of(
    TEXT, st.integers().map(str), st.floats().map(repr),
    st.sampled_from(["9" * 5000, "1_0", "１", "1e999", "-0.0", "%s", str(2**32), "0x10", "1e-400", "nan", " 1 "]),
)  # fmt: skip
RANGES = {
    flag_types.number: math.isfinite,
    flag_types.positive_number: lambda value: math.isfinite(value) and value > 0,
    flag_types.sampling_temperature: lambda value: 0.01 <= value < math.inf,
    flag_types.not_negative: lambda value: math.isfinite(value) and value >= 0,
    flag_types.whole_number: lambda value: isinstance(value, int) and 0 <= value < 2**32,
    flag_types.positive_int: lambda value: isinstance(value, int) and 0 < value < 2**32,
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
            plain = (int if kind in (flag_types.whole_number, flag_types.positive_int) else float)(text)
        except ValueError:
            return
        assert not RANGES[kind](plain)
    else:
        assert RANGES[kind](value) and value == type(value)(text)
