"""The flags: the released script's defaults, the paper's command, and what is refused."""

import re
from pathlib import Path

import pytest

from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.unlearn_harm_new import main, parse_flags

METRICS = {
    "step", "gd_loss", "rd_loss", "pd_loss", "total_loss", "lr", "grad_norm", "tokens", "seconds",
}  # fmt: skip


def test_released_flags_and_defaults():
    args = parse_flags([])
    released = {
        "max_unlearn_steps": 1000,
        "bad_weight": 0.5,
        "random_weight": 1,
        "normal_weight": 1,
        "batch_size": 2,
        "lr": 2e-5,
        "model_name": "facebook/opt-1.3b",
        "saved_model": None,
    }
    added = {"variant": "released", "k_random": 5, "scaling_coef": 1.0, "seed": 8888, "stage": "all"}
    assert {name: getattr(args, name) for name in released | added} == released | added
    assert args.model_save_dir == ROOT / "models" / "opt-1.3b-harmful"
    assert args.normal_dataset == str(ROOT / "dataloader" / "TruthfulQA.csv")


def test_the_papers_command_parses_as_published():
    args = parse_flags(
        "--bad_weight 2.5 --random_weight 2.5 --normal_weight 1 --lr 2e-4 --max_unlearn_steps 1000 "
        "--model_name=facebook/opt-2.7b --model_save_dir=m --batch_size 2 "
        "--log_file=logs/opt-2.7b-unlearn_new.log --task_vector_saving_path=u".split()
    )
    assert (args.bad_weight, args.lr, args.batch_size) == (2.5, 2e-4, 2)
    assert args.log_file == Path("logs/opt-2.7b-unlearn_new.log")


@pytest.mark.parametrize(
    "bad",
    [
        "--lr 0",
        "--lr nan",
        "--batch_size 0",
        "--bad_weight inf",
        "--max_unlearn_steps -1",
        "--variant both",
        "--k_random 0",
        "--seed -1",
        "--seed 4294967296",
        "--no_such_flag",
        "--lr",
        "--bad_weight 0 --random_weight 0 --normal_weight 0",
        "--max_unlearn_steps 5 --warmup_steps 5",
        "--max_grad_norm 0",
    ],
)
def test_bad_flags_exit_2(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        main(bad.split())
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for word in ("--bad_weight", "default: 0.5", "Stage 1", "The paper's OPT-2.7B run"):
        assert word in text


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    text = capsys.readouterr().out
    for name in vars(parse_flags([])):
        assert re.search(rf"^  --{name}\b.*(\n {{10,}}\S|  \S)", text, re.MULTILINE), name
