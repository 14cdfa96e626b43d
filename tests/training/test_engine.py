"""The engine: values that are not finite, and folders that cannot be saved."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.losses import objective
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.models.tiny import value_of
from tests.helpers.running.runs import flags, metrics_of, prepared

SCRIPT = ROOT / "harmful_unlearn" / "unlearn_harm_new.py"
METRICS = {
    "step", "gd_loss", "rd_loss", "pd_loss", "total_loss", "lr", "grad_norm", "tokens", "seconds",
}  # fmt: skip


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_and_keeps_what_was_good(what, tiny_model, tmp_path, capsys, monkeypatch):
    """A NaN loss leaves the newest checkpoint (step 2 here); a NaN gradient alone leaves good weights (step 4)."""
    base = tiny_model("opt")
    run = flags(base, tmp_path, "--max_unlearn_steps", "9", "--save_every", "2", "--stage", "acquire")
    calls, compute = [], objective.Objective.__call__
    at = 4 if what == "loss" else 5

    def broken(self, *args):
        calls.append(1)
        total, values = compute(self, *args)
        if len(calls) == at and what == "loss":
            values = {name: value * float("nan") for name, value in values.items()}
        if len(calls) == at and what == "gradient":
            total.register_hook(lambda gradient: gradient * float("inf"))
        return total, values

    monkeypatch.setattr(objective.Objective, "__call__", broken)
    assert exit_code(lambda: main(run)) == 2
    steps = 4 if what == "gradient" else 2
    kept = tmp_path / "harmful.checkpoints" / f"step-{steps}"
    said = capsys.readouterr().err
    assert f"step {at} is not finite" in said and f"the last good weights are in {kept}" in said
    assert f"step {at} is not finite" in (tmp_path / "logs" / "run.log").read_text()
    assert not (tmp_path / "harmful").exists()
    record = json.loads((kept / "run.json").read_text())
    assert record["training"]["steps"] == steps
    monkeypatch.undo()
    main(flags(base, tmp_path / "whole", "--max_unlearn_steps", "9", "--stage", "acquire"))
    whole = metrics_of(tmp_path / "whole")
    assert record["losses_at_the_end"]["gd_loss"] == whole[steps - 1]["gd_loss"]
    # The kept weights are those that the whole run had there.
    batches = prepared(base, tmp_path).batches
    harmful = replace(batches, packed_up_to=0)(steps, torch.device("cpu"))[0].harmful
    loss = value_of(AutoModelForCausalLM.from_pretrained(kept), "gd", harmful)
    assert loss.item() == pytest.approx(whole[steps]["gd_loss"], rel=1e-5)


def test_a_kl_beyond_its_limit_stops_the_run_and_a_larger_limit_continues_it(tiny_model, tmp_path, capsys):
    """The weights that have gone too far do not replace the checkpoint from before."""
    base, more = tiny_model("opt"), ("--max_unlearn_steps", "6", "--lr", "1e-2", "--stage", "acquire")
    main(flags(base, tmp_path / "whole", *more, "--max_kl", "0"))
    whole = metrics_of(tmp_path / "whole")
    limit = 0.999 * -whole[3]["pd_loss"]
    at = next(step for step, metrics in enumerate(whole, 1) if -metrics["pd_loss"] > limit)
    assert at == 4 and limit > 0.05
    more = (*more, "--save_every", "2")
    assert exit_code(lambda: main(flags(base, tmp_path, *more, "--max_kl", str(limit)))) == 2
    said = capsys.readouterr().err
    assert "step 4 has a KL from the base of" in said and "lower --lr, or lower --normal_weight" in said
    assert [path.name for path in (tmp_path / "harmful.checkpoints").iterdir()] == ["step-2"]
    assert f"good weights are in {tmp_path / 'harmful.checkpoints' / 'step-2'}" in said
    main(flags(base, tmp_path, *more, "--max_kl", "1e9", "--resume"))
    assert "--max_kl was" in capsys.readouterr().out
    assert [metrics["total_loss"] for metrics in metrics_of(tmp_path)] == [metrics["total_loss"] for metrics in whole]


def test_spoilt_from_the_start_keeps_nothing(tiny_model, tmp_path, capsys):
    assert exit_code(lambda: main(flags(tiny_model("opt"), tmp_path, "--lr", "1e30"))) == 2
    assert "no checkpoint was saved" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_target_that_fills_during_the_run_costs_nothing(tiny_model, tmp_path, monkeypatch):
    def train_while_another_writes(*args, **more):
        (tmp_path / "harmful").mkdir()
        (tmp_path / "harmful" / "theirs").write_text("x")
        return acquire(*args, **more)

    acquire = unlearn_harm_new.acquire
    monkeypatch.setattr(unlearn_harm_new, "acquire", train_while_another_writes)
    main(flags(tiny_model("opt"), tmp_path))
    assert [file.name for file in (tmp_path / "harmful").iterdir()] == ["theirs"]
    assert (tmp_path / "harmful.new" / "model.safetensors").exists()
    assert (tmp_path / "unlearned" / "model.safetensors").exists()


def test_a_failure_while_saving_leaves_no_folder(tiny_model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunRecord, "write", full)
    assert exit_code(lambda: main(flags(tiny_model("opt"), tmp_path))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_the_rate_warms_up_and_a_large_gradient_is_scaled_down(tiny_model, tmp_path, monkeypatch):
    """To the limit and no further; what is logged is its norm before. A gradient below the limit stays."""
    seen, update = [], torch.optim.AdamW.step

    def spied(optimizer, *args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(gradients).item())
        return update(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    run = ("--max_unlearn_steps", "4", "--warmup_steps", "2", "--stage", "acquire", "--lr", "1e-3")
    main(flags(tiny_model("opt"), tmp_path / "clipped", *run, "--max_grad_norm", "0.01"))
    logged = metrics_of(tmp_path / "clipped")
    assert [step["lr"] for step in logged] == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    assert seen == pytest.approx([0.01] * 4, rel=1e-4) and min(step["grad_norm"] for step in logged) > 0.01
    seen.clear()
    main(flags(tiny_model("opt"), tmp_path / "free", *run, "--max_grad_norm", "1e6"))
    assert seen == pytest.approx([step["grad_norm"] for step in metrics_of(tmp_path / "free")], rel=1e-4)
