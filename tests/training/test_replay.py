"""--replay: a saved model is made again from its run.json, or it is said why that would not be the same run."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage import provenance
from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.training.recorded_flags import replayed_flags
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.inputs.tables import TRUTHFUL
from tests.helpers.running.runs import flags


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    """Uncommitted changes would count as other code."""
    monkeypatch.setattr(provenance, "_commit", lambda: "abc")


@pytest.fixture
def made(tiny_model, tmp_path):
    """The folders that a run left, with settings that are no defaults, and a copy of its base."""
    base = shutil.copytree(tiny_model("opt"), tmp_path / "base")
    more = "--method lands --lora on --lora_r 3 --max_unlearn_steps 2 --max_length 60 --seed 5 --scaling_coef 2.5"
    main(flags(base, tmp_path / "first", *more.split()))
    return tmp_path / "first", base


def again(source, out, *more: str) -> list[str]:
    words = ["--replay", str(source), "--model_save_dir", str(out / "harmful"), "--log_file", str(out / "run.log")]
    return [*words, "--task_vector_saving_path", str(out / "unlearned"), *more]


@pytest.mark.parametrize("source", ["unlearned", "harmful/run.json"])
def test_the_same_model_comes_out_and_the_log_says_so(source, made, tmp_path, capsys):
    first, _ = made
    main(again(first / source, tmp_path / "second"))
    log = (tmp_path / "second" / "run.log").read_text()
    assert "the losses at the end are equal" in log and "1 of 1 files of weights are equal, byte for byte" in log
    assert "versions and hardware are those of the recorded run" in capsys.readouterr().out
    assert (tmp_path / "second" / "unlearned").exists() == (source == "unlearned")
    settings = parse_flags(again(first / source, tmp_path))
    assert (settings.method, settings.lora_r, settings.seed, settings.scaling_coef) == ("lands", 3, 5, 2.5)
    assert settings.model_save_dir == tmp_path / "harmful" and not settings.overwrite


def test_a_method_that_does_not_negate_and_a_record_of_before_the_newest_flags(tiny_model, tmp_path):
    main(flags(tiny_model("opt"), tmp_path / "first", "--method", "ft", "--max_unlearn_steps", "2"))
    file = tmp_path / "first" / "unlearned" / "run.json"
    record = json.loads(file.read_text())
    for name in ("warmup_steps", "max_grad_norm", "replay"):
        del record["stage_1"]["flags"][name]
    file.write_text(json.dumps(record))
    main(again(tmp_path / "first" / "unlearned", tmp_path / "second"))
    assert "1 of 1 files of weights are equal" in (tmp_path / "second" / "run.log").read_text()


def test_a_coefficient_is_a_part_of_alpha_and_a_checkpoint_is_no_model(made):
    first, _ = made
    file = first / "unlearned" / "run.json"
    record = json.loads(file.read_text())
    record["finetuned"] = dict.fromkeys(record["finetuned"], 0.5)
    file.write_text(json.dumps(record))
    assert replayed_flags(first / "unlearned")["scaling_coef"] == 1.25
    record["stage_1"]["training"]["steps"] = 1
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match="is a checkpoint, of step 1 of 2"):
        replayed_flags(first / "unlearned")


def test_a_model_is_not_compared_with_itself(made, capsys):
    first, _ = made
    with pytest.raises(UserError, match="equal or inside one another"):
        main([*again(first / "harmful", first), "--overwrite"])
    with pytest.raises(SystemExit):
        parse_flags(again(first / "unlearned", first, "--stage", "negate"))
    assert "--replay trains the model again" in capsys.readouterr().err


def test_another_result_is_said(made, tmp_path):
    first, _ = made
    record = json.loads((first / "harmful" / "run.json").read_text())
    record["losses_at_the_end"]["gd_loss"] += 0.5
    record["packages"]["torch"], record["hardware"]["threads"] = "1.0", 99
    (first / "harmful" / "run.json").write_text(json.dumps(record))
    with (first / "harmful" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    main(again(first / "harmful", tmp_path / "second"))
    log = (tmp_path / "second" / "run.log").read_text()
    assert "the losses at the end differ by at most 0.5" in log and "0 of 1 files of weights are equal" in log
    assert "torch was 1.0" in log and "threads was 99" in log and log.count("the rounding may change") == 2


@pytest.mark.parametrize(
    "more, message",
    [
        (["--seed", "6"], "--seed was 5 and is 6 now"),
        (["--max_length", "59"], "--max_length was 60"),
        (["--lora_r", "2"], "LoRA was"),
        (["--scaling_coef", "2"], "--scaling_coef was 2.5 and is 2.0 now"),
        (["--normal_dataset", "other.csv"], r"normal data \(--normal_dataset\) was"),
        (["weights"], r"base model \(--model_name\) was"),
        (["tokenizer.json"], "the base's tokenizer.json was"),
        (["config.json"], "the base's config.json was"),
    ],
)
def test_what_would_not_be_the_same_run_is_refused(more, message, made, tmp_path, monkeypatch):
    first, base = made
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text(TRUTHFUL.read_text() + "\n")
    if more == ["weights"]:  # one matrix, which is not the first
        weights = load_file(base / "model.safetensors")
        weights["model.decoder.layers.1.fc2.weight"] += 1
        save_file(weights, base / "model.safetensors")
    elif len(more) == 1:
        (base / more[0]).write_text((base / more[0]).read_text() + "\n")
    more = more if len(more) == 2 else []
    with pytest.raises(UserError, match=message):
        main(again(first / "unlearned", tmp_path / "second", *more))
    assert not (tmp_path / "second").exists()


def test_another_result_from_the_same_versions_and_hardware_is_an_error(made, tmp_path):
    first, _ = made
    record = json.loads((first / "harmful" / "run.json").read_text())
    record["losses_at_the_end"]["gd_loss"] += 0.5
    (first / "harmful" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="the result is not that of"):
        main(again(first / "harmful", tmp_path / "second"))
    assert "differ by at most 0.5" in (tmp_path / "second" / "run.log").read_text()


def test_relative_paths_are_those_of_the_folder_where_the_run_was_started(made, tmp_path, monkeypatch):
    first, base = made
    monkeypatch.chdir(tmp_path)
    main([*flags(base, tmp_path / "third", "--max_unlearn_steps", "1"), "--model_name", "base", "--overwrite"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"names base from {tmp_path}: start the replay there, or give --model_name"):
        main(again(tmp_path / "third" / "unlearned", tmp_path / "fourth"))
    main(again(tmp_path / "third" / "unlearned", tmp_path / "fourth", "--model_name", "../base"))


def test_what_cannot_be_replayed_names_the_reason(made, tmp_path, capsys):
    first, base = made
    with pytest.raises(UserError, match="records a training"):
        replayed_flags(base)
    with pytest.raises(UserError, match="there is no nowhere"):
        replayed_flags(Path("nowhere"))
    record = json.loads((first / "unlearned" / "run.json").read_text())
    two = record | {"finetuned": {"a": 1.0, "b": 1.0}, "stage_1_of_model_1": record["stage_1"]}
    two["stage_1_of_model_2"] = two.pop("stage_1")
    (first / "unlearned" / "run.json").write_text(json.dumps(two))
    with pytest.raises(UserError, match="several trainings"):
        replayed_flags(first / "unlearned")
    record["stage_1"]["flags"]["of_the_future"] = True
    (first / "unlearned" / "run.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        parse_flags(again(first / "unlearned", tmp_path))
    assert "unknown flag of_the_future" in capsys.readouterr().err


def test_differences_are_graded_the_gravest_first(monkeypatch):
    before = provenance.provenance()
    assert provenance.differences(before) == []
    code = {"version": "0.0", "commit": "abc-dirty"}
    changed = {**before, "python": "2.7", "code": code, "packages": {**before["packages"], "numpy": "1.0"}}
    lines = provenance.differences(changed)
    grades = [grade for grade in provenance.GRADES if "judge" not in grade]
    assert [line.rpartition(": ")[2] for line in lines] == grades
    assert "code was 0.0, commit abc-dirty with changes" in lines[0] and "numpy was 1.0" in lines[1]
    monkeypatch.setattr(provenance, "_commit", lambda: "abc-dirty")
    assert provenance.differences(provenance.provenance())[0].startswith("code was"), "it is not known what changed"
    assert all("not recorded" in line for line in provenance.differences({}) if not line.startswith("code"))
