"""--resume: what is left to do, and whether it is the same run."""

import shutil

import pytest

from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.training.checkpointing import TrainingCheckpoints
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.models.tiny import GOLDENS
from tests.helpers.running.resumed import assert_same, flags, run


def test_resume_takes_the_newest_whole_checkpoint_or_the_given_one(tiny_model, tmp_path, stop_after, capsys):
    base = tiny_model("opt")
    assert run(base, tmp_path / "whole") == 0
    stop_after(4)
    assert run(base, tmp_path / "run", "--save_every", "2", "--keep_checkpoints", "3") == 143
    checkpoints = tmp_path / "run" / "harmful.checkpoints"
    assert TrainingCheckpoints(tmp_path / "run" / "harmful", 3).steps() == [5, 4, 2]
    broken = checkpoints / "step-5" / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    given = shutil.copytree(tmp_path / "run", tmp_path / "given")
    assert run(base, tmp_path / "run", "--resume") == 0
    assert "continues after step 4" in capsys.readouterr().out
    given_flags = flags(base, given, "--resume", str(given / "harmful.checkpoints" / "step-2"))
    assert exit_code(lambda: main(given_flags)) == 0
    assert "continues after step 2" in capsys.readouterr().out
    for out in ("run", "given"):
        assert_same(tmp_path / out, tmp_path / "whole")


def test_resume_of_a_run_that_has_not_begun_and_of_one_that_is_done(tiny_model, tmp_path, capsys):
    base = tiny_model("opt")
    assert run(base, tmp_path / "run", "--resume", "--stage", "acquire") == 0
    assert run(base, tmp_path / "run", "--resume") == 0
    assert "stage 1, " not in capsys.readouterr().out.split("stage 1 model saved")[-1]
    assert run(base, tmp_path / "run", "--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert run(base, tmp_path / "whole") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "changed, shown",
    [
        (["--lr", "2e-3"], "--lr was 0.001 and is 0.002 now"),
        (["--batch_size", "3"], "--batch_size times the number of processes was 2 and is 3 now"),
        (["--bad_weight", "2"], "--bad_weight was 0.5 and is 2.0 now"),
        (["--seed", "1"], "--seed was 8888 and is 1 now"),
        (["--variant", "paper"], "--variant was released and is paper now"),
        (["--precision", "bf16"], "--precision was fp32 and is bf16 now"),
        (["--lora", "on"], "LoRA was None and is"),
        (["--no_packing"], "--no_packing was False and is True now"),
        (["--harm_category", "Violence"], "--harm_category was [] and is ['Violence'] now"),
        (["--normal_dataset", str(GOLDENS / "TruthfulQA_current.csv")], "normal data (--normal_dataset) was"),
        (["--max_unlearn_steps", "9"], "--max_unlearn_steps was 6 and is 9 now"),
    ],
)
def test_a_flag_that_changes_the_result_is_refused_with_both_values(changed, shown, stopped, tiny_model, capsys):
    if changed[0] == "--normal_dataset":
        other = stopped / "other.csv"
        other.write_text((GOLDENS / "TruthfulQA.csv").read_text().replace("?", "??", 1))
        changed = ["--normal_dataset", str(other)]
    assert run(tiny_model("opt"), stopped, "--resume", *changed) == 2
    assert shown in capsys.readouterr().err


def test_other_flags_are_taken_and_noted(stopped, tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model("opt"), tmp_path / "moved")  # the same weights elsewhere
    assert run(base, stopped, "--resume", "--save_every", "2", "--scaling_coef", "0.5") == 0
    said = capsys.readouterr().out
    assert "note: --save_every was None and is 2 now" in said and "note: --scaling_coef was 1.0 and is 0.5 now" in said


def test_scaling_coef_belongs_to_a_landing_run(tiny_model, tmp_path, stop_after, capsys):
    stop_after(2)
    assert run(tiny_model("opt"), tmp_path, "--method", "land") == 143
    assert run(tiny_model("opt"), tmp_path, "--method", "land", "--resume", "--scaling_coef", "1") == 2
    assert "--scaling_coef was 3.0 and is 1.0 now" in capsys.readouterr().err


def test_a_checkpoint_is_neither_ignored_nor_mixed_up(stopped, tiny_model, capsys):
    base = tiny_model("opt")
    assert run(base, stopped) == 2
    assert "--resume continues it, --overwrite starts again" in capsys.readouterr().err
    assert run(base, stopped, "--overwrite", "--seed", "4") == 0
    assert not (stopped / "harmful.checkpoints").exists()


def test_a_finished_run_with_other_flags_is_refused(tiny_model, tmp_path, capsys):
    base = tiny_model("opt")
    assert run(base, tmp_path) == 0
    assert run(base, tmp_path, "--resume", "--lr", "1") == 2
    assert "--lr was 0.001 and is 1.0 now" in capsys.readouterr().err
    assert run(base, tmp_path, "--resume", "--scaling_coef", "2") == 2
    assert "holds another model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_overwrite_goes_on_beside_what_it_replaces(tiny_model, tmp_path, stop_after, capsys):
    base, more = tiny_model("opt"), ["--overwrite", "--seed", "1"]
    assert run(base, tmp_path / "run") == 0
    stop_after(2)
    assert run(base, tmp_path / "run", *more) == 143
    assert run(base, tmp_path / "run", "--resume", "--seed", "1") == 2
    assert "--seed was 8888 and is 1 now" in capsys.readouterr().err
    assert run(base, tmp_path / "run", *more, "--resume") == 0
    assert "continues after step 3" in capsys.readouterr().out
    assert run(base, tmp_path / "whole", *more) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert run(base, tmp_path / "run", "--overwrite", "--seed", "2", "--resume") == 0  # it was killed at once
    assert run(base, tmp_path / "other", "--seed", "2") == 0
    assert_same(tmp_path / "run", tmp_path / "other")


def test_what_was_unlearned_with_an_earlier_copy_is_not_taken_for_done(tiny_model, tmp_path, capsys):
    base, more = tiny_model("opt"), ["--seed", "1"]
    assert run(base, tmp_path / "run") == 0
    assert run(base, tmp_path / "run", *more, "--overwrite", "--stage", "acquire") == 0  # and then it was killed
    assert run(base, tmp_path / "run", *more, "--resume") == 2
    assert "as it was before" in capsys.readouterr().err
    assert run(base, tmp_path / "run", *more, "--resume", "--overwrite") == 0
    assert run(base, tmp_path / "whole", *more) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
