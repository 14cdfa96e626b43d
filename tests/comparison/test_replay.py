"""reproduce.py --replay: the flags of a recorded comparison, the check of what it read, and the figures compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harmful_unlearn import recipes
from harmful_unlearn.comparison import replay
from harmful_unlearn.comparison.recorded_flags import replayed_flags
from harmful_unlearn.comparison.settings import parse_flags
from harmful_unlearn.errors import UserError
from harmful_unlearn.recipes import recipe
from harmful_unlearn.reproduce import main
from harmful_unlearn.storage.provenance import provenance
from tests.helpers.inputs.world import make_world


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    """Uncommitted changes would count as other code."""
    monkeypatch.setattr("harmful_unlearn.storage.provenance._commit", lambda: "abc")


FIGURE = {"seed": 0, "model": "sku", "set": "unseen", "decoding": "greedy", "metric": "harmful_rate"}
MEASURED = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}


@pytest.fixture
def recorded(tmp_path):
    """Writes comparison.json into a folder, and returns that."""

    def write(**content):
        folder = tmp_path / "recorded"
        folder.mkdir()
        (folder / "comparison.json").write_text(json.dumps(content))
        return folder

    return write


def test_the_flags_are_the_recorded_ones_but_for_the_output(recorded, tmp_path):
    words = "--model_name m --recipe demo --seeds 3 1 --alpha_sweep 0,1 --n_seen 7 --judge phrases:p.txt".split()
    more = ["--train_flags", "--precision fp32 --system_prompt 'a b'", "--output", str(tmp_path / "recorded")]
    first = parse_flags([*words, *more])
    folder = recorded(flags=first.to_json())
    again = parse_flags(["--replay", str(folder)])
    changed = {name for name, value in vars(again).items() if value != getattr(first, name)}
    assert changed == {"output", "replay"} and again.output == tmp_path / "recorded-replayed"
    other = parse_flags(["--replay", str(folder / "comparison.json"), "--output", "o", "--seeds", "5"])
    assert str(other.output) == "o" and other.seeds == [5] and other.train_flags == first.train_flags
    replay.check_source(again)
    with pytest.raises(UserError, match="--seeds is not as"):
        replay.check_source(other)
    with pytest.raises(UserError, match="--output is the comparison"):
        replay.check_source(replace(again, output=folder))


def test_a_comparison_of_an_earlier_version_is_refused(recorded):
    with pytest.raises(UserError, match="does not record its flags"):
        replayed_flags(recorded(figures=[]))
    with pytest.raises(UserError, match="there is no nowhere/comparison.json"):
        replayed_flags(Path("nowhere"))


def test_other_data_or_another_base_are_refused(recorded):
    known = {
        "base's weights": "abc",
        "harmful": {"sha256": "1", "revision": None},
        "normal": {"sha256": "2", "revision": None},
    }
    folder = recorded(inputs={"0": known})
    replay.check_inputs(folder, 0, known)
    replay.check_inputs(folder, 0, {"harmful": known["harmful"]})  # of a base that is not downloaded yet
    replay.check_inputs(folder, 1, {})
    with pytest.raises(UserError, match="seed 0 base's weights, normal differ"):
        replay.check_inputs(folder, 0, {**known, "base's weights": "x", "normal": {"sha256": "3", "revision": None}})


def test_figures_are_compared_one_by_one(recorded, capsys):
    before = [{**FIGURE, "model": name, **MEASURED} for name in ("sku", "base", "lands", "ga", "gone")]
    before[3] |= {"value": None, "low": None, "high": None}
    folder = recorded(figures=before, provenance=provenance())
    now = [dict(figure) for figure in before[:4]]
    now[1]["value"], now[2]["value"] = 0.59, 0.7
    replay.compare(folder, before[:4])
    capsys.readouterr()
    with pytest.raises(UserError, match="the figures are not those of .* same versions and hardware"):
        replay.compare(folder, now)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].startswith("versions and hardware are those")
    assert lines[1:3] == [
        "4 of 5 recorded figures are there again",
        "2 are equal, and 1 are outside of the recorded 95 % interval",
    ]
    assert "lands" in lines[3] and lines[3].endswith("0.7 (recorded: 0.5)") and len(lines) == 4


@pytest.mark.slow
def test_a_comparison_comes_out_again(tmp_path, monkeypatch, capsys):
    make_world(tmp_path / "0", 0)
    shared = {"max_unlearn_steps": 2, "batch_size": 2, "lr": 1e-3, "precision": "fp32"}
    weights = {"bad_weight": 1, "random_weight": 1, "normal_weight": 0.1}
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipe(shared, weights, {}))
    data = tmp_path / "{seed}" / "data"
    words = f"""--model_name {tmp_path}/{{seed}}/base --recipe tiny --seeds 0 --runs sku --output {tmp_path}/first
        --harmful_dataset {data}/harmful.jsonl --unseen_dataset {data}/unseen.jsonl --normal_dataset {data}/normal.csv
        --n_seen 4 --n_unseen 6 --n_normal 4 --max_new_tokens 5 --precision fp32 --relevance_judge none"""
    main(words.split())
    capsys.readouterr()
    main(["--replay", str(tmp_path / "first")])
    said = capsys.readouterr().out
    names = ("first", "first-replayed")
    first, again = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in names)
    assert first["figures"] == again["figures"] and first["inputs"] == again["inputs"]
    number = len(first["figures"])
    assert f"{number} of {number} recorded figures are there again\n{number} are equal, and 0 are outside" in said
    normal = tmp_path / "0" / "data" / "normal.csv"
    normal.write_text(normal.read_text() + "\n")
    with pytest.raises(UserError, match="is the comparison that is replayed"):
        main(["--replay", str(tmp_path / "first"), "--output", str(tmp_path / "first")])
    with pytest.raises(UserError, match="normal differ"):
        main(["--replay", str(tmp_path / "first"), "--output", str(tmp_path / "third")])
