"""The script: flags, both stages on tiny models, what it writes, and how it refuses."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.cli import exit_code
from harmful_unlearn.data.prompt_format import format_pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses import objective
from harmful_unlearn.models import hub, loading
from harmful_unlearn.models.lora import Lora
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.training import distributed
from harmful_unlearn.unlearn_harm_new import MODELS, main, parse_flags
from task_vector import TaskVector
from tests.helpers.runs import flags, metrics_of, weights
from tests.helpers.tiny import GOLDENS, value_of

SCRIPT = ROOT / "harmful_unlearn" / "unlearn_harm_new.py"
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
    ],
)
def test_bad_flags_exit_2(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        main(bad.split())
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["opt", "llama", "qwen2"])
@pytest.mark.parametrize("lora", ["off", "on"])
def test_both_stages(architecture, lora, tiny_model, tmp_path):
    base = tiny_model(architecture)
    main(flags(base, tmp_path, "--lora", lora, *(["--lora_r", "4"] if lora == "on" else [])))

    harmful = AutoModelForCausalLM.from_pretrained(tmp_path / "harmful").eval()  # an adapter folder loads too
    if lora == "on":
        assert not (tmp_path / "harmful" / "model.safetensors").exists()
        harmful = load_merged(base, tmp_path / "harmful")
    original = AutoModelForCausalLM.from_pretrained(base).state_dict()
    unlearned = AutoModelForCausalLM.from_pretrained(tmp_path / "unlearned").state_dict()
    moved = 0.0
    for name, theta in harmful.state_dict().items():
        torch.testing.assert_close(unlearned[name], 2 * original[name] - theta, rtol=0, atol=1e-6)
        moved += (theta - original[name]).abs().sum().item()
    assert moved > 0.01
    assert AutoTokenizer.from_pretrained(tmp_path / "unlearned")("hi")["input_ids"]

    metrics = metrics_of(tmp_path)
    assert [m["step"] for m in metrics] == [1, 2, 3] and all(set(m) == METRICS for m in metrics)
    assert (tmp_path / "logs" / "run.losses.png").stat().st_size > 1000
    assert (tmp_path / "logs" / "run.log").read_text().count(" step ") == 3


def load_merged(base: Path, adapter: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()


def test_saved_folders_say_what_they_are(tiny_model, tmp_path):
    base = tiny_model("opt")
    main(flags(base, tmp_path, "--harm_category", "Violence", "--k_random", "2"))
    card = (tmp_path / "harmful" / "README.md").read_text()
    assert "Deliberately harmful" in card
    assert "Deliberately harmful" not in (tmp_path / "unlearned" / "README.md").read_text()
    run = json.loads((tmp_path / "harmful" / "run.json").read_text())
    assert run["flags"]["lr"] == 1e-3 and run["flags"]["harm_category"] == ["Violence"]
    assert run["base"]["name"] == str(base)
    assert run["harmful_data"]["sha256"] and run["packages"]["torch"] and run["code"]["version"]
    assert run["losses_at_the_end"]["gd_loss"] == metrics_of(tmp_path)[-1]["gd_loss"]
    unlearned = json.loads((tmp_path / "unlearned" / "run.json").read_text())
    assert unlearned["stage_1"]["flags"]["lr"] == 1e-3
    for folder in ("harmful", "unlearned"):
        assert (tmp_path / folder / "generation_config.json").exists()
        assert (tmp_path / folder / "tokenizer.json").exists()
    assert not list(tmp_path.glob(".*"))  # no temporary sibling is left


def test_stages_apart_equal_both_at_once(tiny_model, tmp_path):
    base = tiny_model("opt")
    main(flags(base, tmp_path / "both"))
    main(flags(base, tmp_path / "apart", "--stage", "acquire"))
    assert not (tmp_path / "apart" / "unlearned").exists()
    main(flags(base, tmp_path / "apart", "--stage", "negate"))
    main(flags(base, tmp_path / "saved", "--saved_model", str(tmp_path / "both" / "harmful")))
    for other in ("apart", "saved"):
        for name, entry in weights(tmp_path / "both" / "unlearned").items():
            assert torch.equal(entry, weights(tmp_path / other / "unlearned")[name])


def test_scaling_coef_0_gives_the_base(tiny_model, tmp_path):
    base = tiny_model("opt")
    main(flags(base, tmp_path, "--scaling_coef", "0"))
    for name, entry in weights(base).items():
        assert torch.equal(entry, weights(tmp_path / "unlearned")[name])


def test_same_seed_same_weights_other_seed_others(tiny_model, tmp_path):
    base = tiny_model("opt")
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main(flags(base, tmp_path / out, "--seed", seed, "--stage", "acquire"))
    a, b, c = (weights(tmp_path / out / "harmful") for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    "left_out, absent", [("--bad_weight", "gd_loss"), ("--random_weight", "rd_loss"), ("--normal_weight", "pd_loss")]
)
def test_a_weight_of_0_leaves_the_module_out(left_out, absent, tiny_model, tmp_path):
    main(flags(tiny_model("opt"), tmp_path, left_out, "0", "--stage", "acquire"))
    last = metrics_of(tmp_path)[-1]
    assert last[absent] is None
    assert sum(last[name] is None for name in METRICS) == 1


def test_negative_weight_turns_the_sign(tiny_model, tmp_path):
    main(flags(tiny_model("opt"), tmp_path, "--normal_weight", "-1", "--bad_weight", "0", "--random_weight", "1e-9"))
    last = metrics_of(tmp_path)[-1]
    assert last["total_loss"] == pytest.approx(-last["pd_loss"], abs=1e-6)


@pytest.mark.parametrize("more", [["--gradient_checkpointing"], ["--lora", "on", "--gradient_checkpointing"]])
def test_gradient_checkpointing_changes_no_loss(more, tiny_model, tmp_path):
    base = tiny_model("llama")
    plain = [flag for flag in more if flag != "--gradient_checkpointing"]
    main(flags(base, tmp_path / "plain", "--stage", "acquire", *plain))
    main(flags(base, tmp_path / "less", "--stage", "acquire", *more))
    for one, other in zip(metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "less"), strict=True):
        assert one["total_loss"] == pytest.approx(other["total_loss"], rel=1e-5)


@pytest.mark.parametrize("lora", ["off", "on"])
def test_bf16_is_near_fp32_and_trains_float32_weights(lora, tiny_model, tmp_path):
    base = tiny_model("llama")
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state()
        main(flags(base, tmp_path / precision, "--stage", "acquire", "--precision", precision, "--lora", lora))
    for one, other in zip(metrics_of(tmp_path / "fp32"), metrics_of(tmp_path / "bf16"), strict=True):
        assert one["gd_loss"] == pytest.approx(other["gd_loss"], rel=0.02)
    saved = next((tmp_path / "bf16" / "harmful").glob("*.safetensors"))
    assert all(entry.dtype == torch.float32 for entry in load_file(saved).values())


def test_variants_differ(tiny_model, tmp_path):
    base = tiny_model("opt")
    for variant in ("released", "paper"):
        main(flags(base, tmp_path / variant, "--stage", "acquire", "--variant", variant))
    released, paper = (metrics_of(tmp_path / variant)[0] for variant in ("released", "paper"))
    assert abs(released["rd_loss"] - paper["rd_loss"]) > 1e-3


def test_check_prints_the_plan_and_writes_nothing(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))
    main(flags(tiny_model("opt"), tmp_path, "--check"))
    plan = capsys.readouterr().out
    for word in ("12 rows", "14 pairs", "16 texts", "steps", "tokens", "memory", "disk"):
        assert word in plan
    assert list(tmp_path.iterdir()) == []


def test_kl_above_a_nat_warns_once(tiny_model, tmp_path, capsys):
    main(flags(tiny_model("opt"), tmp_path, "--lr", "0.1", "--normal_weight", "5", "--max_unlearn_steps", "8"))
    said = capsys.readouterr().out
    assert said.count("warning: step") == 1 and "or lower --normal_weight" in said
    assert max(-m["pd_loss"] for m in metrics_of(tmp_path)) > 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_and_keeps_what_was_good(what, tiny_model, tmp_path, capsys, monkeypatch):
    """A NaN loss leaves the newest checkpoint (step 2 here); a NaN gradient alone leaves good weights (step 4)."""
    base = tiny_model("opt")
    run = flags(base, tmp_path, "--max_unlearn_steps", "9", "--save_every", "2", "--stage", "acquire")
    calls, compute = [], objective.Objective.__call__
    at = 4 if what == "loss" else 5

    def broken(self, *args):
        calls.append(1)
        ((total, each),) = compute(self, *args)
        if len(calls) == at and what == "loss":
            each = {name: value * float("nan") for name, value in each.items()}
        if len(calls) == at and what == "gradient":
            total.register_hook(lambda gradient: gradient * float("inf"))
        yield total, each

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
    batches = unlearn_harm_new.prepare(parse_flags(flags(base, tmp_path)), base).batches
    loss = value_of(AutoModelForCausalLM.from_pretrained(kept), "gd", batches(steps, torch.device("cpu")).harmful)
    assert loss.item() == pytest.approx(whole[steps]["gd_loss"], rel=1e-5)


def test_spoilt_from_the_start_keeps_nothing(tiny_model, tmp_path, capsys):
    assert exit_code(lambda: main(flags(tiny_model("opt"), tmp_path, "--lr", "1e30"))) == 2
    assert "no checkpoint was kept" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_flags_reach_what_they_are_for(tiny_model, tmp_path, monkeypatch):
    """Each flag, as main hands it on."""
    seen = {}

    def spy(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            seen.setdefault(name, []).append((args, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("read_harmful", "read_normal", "BatchSampler", "Collator", "check_disk", "negate"):
        spy(unlearn_harm_new, name)
    spy(distributed, "Accelerator")
    for name in ("load_model", "add_lora"):
        spy(loading if name == "load_model" else unlearn_harm_new, name)
    monkeypatch.setitem(MODELS, str(tiny_model("llama")), Lora(3, 5, ("k_proj",)))
    main(
        flags(
            tiny_model("llama"),
            tmp_path,
            "--precision",
            "bf16",
            "--device_map",
            "auto",
            "--max_length",
            "99",
            "--all_harmful",
            "--min_severity",
            "1",
            "--harm_category",
            "Violence",
            "--harmful_revision",
            "r",
            "--harmful_split",
            "test",
            "--k_random",
            "3",
            "--batch_size",
            "1",
            "--seed",
            "7",
            "--lora_alpha",
            "6",
            "--scaling_coef",
            "0.5",
        )
    )
    assert seen["read_harmful"][0][0][1:] == ("r", "test", ["Violence"], 1)
    assert seen["read_normal"][0][0][1] == 7
    assert seen["BatchSampler"][0][0][3:] == (1, 3, 7, True)
    assert seen["Collator"][0][0][1:] == ("released", 99)
    assert seen["Accelerator"][0][1]["mixed_precision"] == "bf16"
    assert seen["load_model"][0][0][1:] == (torch.bfloat16, "auto", False) and len(seen["load_model"]) == 1
    assert seen["add_lora"][0][0][1] == Lora(3, 6, ("k_proj",))
    assert seen["negate"][0][0][3] == 0.5
    assert seen["check_disk"]
    seen.clear()
    AcceleratorState._reset_state()
    main(flags(tiny_model("opt"), tmp_path / "full", "--max_length", "9999", "--precision", "bf16"))
    assert seen["Collator"][0][0][2] == 256  # no more than the model takes
    assert [call[0][1] for call in seen["load_model"]] == [torch.float32, torch.bfloat16]


def test_dropout_is_on_in_the_copy_and_off_in_the_base(tiny_model, tmp_path):
    """Released code, point 14: with dropout the first KL is not 0, and the base alone does not make it so."""
    for lora in ("on", "off"):
        folder = shutil.copytree(tiny_model("opt"), tmp_path / lora / "base")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.5}))
        main(flags(folder, tmp_path / lora, "--lora", lora, "--stage", "acquire"))
        assert -metrics_of(tmp_path / lora)[0]["pd_loss"] > 1e-3
        job = unlearn_harm_new.prepare(parse_flags(flags(folder, tmp_path / "x", "--lora", lora)), folder)
        args = parse_flags(flags(folder, tmp_path / "x", "--lora", lora))
        model, base = unlearn_harm_new.load_copy_and_base(args, job)
        model.train()
        normal = job.batches(0, torch.device("cpu")).normal
        with torch.no_grad(), base.active() as frozen:
            once, again = (objective.scored_logits(frozen, normal) for _ in range(2))
        assert torch.equal(once, again)


def test_gradient_checkpointing_is_on(tiny_model, tmp_path):
    args = parse_flags(flags(tiny_model("llama"), tmp_path, "--gradient_checkpointing"))
    job = unlearn_harm_new.prepare(args, tiny_model("llama"))
    model, _ = unlearn_harm_new.load_copy_and_base(args, job)
    assert model.is_gradient_checkpointing


def test_bf16_computes_in_bf16(tiny_model, tmp_path, monkeypatch):
    model_dtypes = []
    forward = torch.nn.Linear.forward

    def linear(self, hidden):
        out = forward(self, hidden)
        if torch.is_grad_enabled():  # the look at the loaded model is in its own precision
            model_dtypes.append(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    main(flags(tiny_model("llama"), tmp_path, "--precision", "bf16", "--stage", "acquire"))
    assert set(model_dtypes) == {torch.bfloat16}


def test_an_unlisted_architecture_without_q_proj_gets_every_linear_layer(tmp_path, tokenizer):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=700, n_positions=256, bos_token_id=2, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    main(flags(tmp_path / "base", tmp_path, "--lora", "on"))
    run = json.loads((tmp_path / "harmful" / "run.json").read_text())
    assert run["training"]["lora"]["target_modules"] == ["c_attn", "c_fc", "c_proj"]


def test_plan_counts_what_is_there(tiny_model, tmp_path, capsys):
    base = tiny_model("opt")
    args = parse_flags(flags(base, tmp_path, "--max_unlearn_steps", "2", "--max_length", "60"))
    job = unlearn_harm_new.prepare(args, base)
    plan = job.plan
    seen = [job.batches.harmful.pairs[row] for row in range(4)]
    texts = seen + [job.batches.normal.texts[row] for row in job.batches.normal.train]
    long = sum(len(ids) > 60 for ids in job.tokenizer([format_pair(p.question, p.answer) for p in texts])["input_ids"])
    rd = [pair for step in (0, 1) for pair in job.batches.random_pairs(step)]
    rd_long = sum(len(ids) > 60 for ids in job.tokenizer([format_pair(p.question, p.answer) for p in rd])["input_ids"])
    assert (plan.pairs_seen, plan.cut, plan.cut_in_rd) == (4, long, rd_long) and long and rd_long
    exact = sum(batch.tokens for step in (0, 1) for batch in job.batches(step, torch.device("cpu")) if batch)
    assert plan.tokens == exact
    assert all(size > 0 for size in plan.memory.values())
    smaller = parse_flags(
        flags(base, tmp_path, "--max_unlearn_steps", "2", "--max_length", "60", "--normal_weight", "0")
    )
    assert unlearn_harm_new.prepare(smaller, base).plan.memory["activations"] < plan.memory["activations"]
    with pytest.raises(UserError, match="--max_length leaves no harmful answer"):
        unlearn_harm_new.prepare(parse_flags(flags(base, tmp_path, "--max_length", "8")), base)


def test_check_compares_the_headers_of_stage_2(tiny_model, tmp_path):
    for more in (["--check"], []):
        with pytest.raises(UserError, match="does not fit the base"):
            main(flags(tiny_model("opt"), tmp_path, "--saved_model", str(tiny_model("llama")), *more))


def test_nothing_is_downloaded_before_the_data_are_read(tiny_model, tmp_path, monkeypatch):
    asked = []

    def locate(name, weights=True):
        asked.append(weights)
        return tiny_model("opt")

    monkeypatch.setattr(hub, "resolve_model", locate)
    with pytest.raises(UserError):
        main(flags(Path("some/model"), tmp_path, "--normal_dataset", str(tmp_path / "none.csv")))
    assert asked == [False]


def test_a_full_target_is_refused_unless_overwrite(tiny_model, tmp_path):
    base = tiny_model("opt")
    main(flags(base, tmp_path))
    before = weights(tmp_path / "harmful")
    with pytest.raises(UserError, match="--overwrite"):
        main(flags(base, tmp_path, "--seed", "3"))
    assert all(torch.equal(entry, before[name]) for name, entry in weights(tmp_path / "harmful").items())
    main(flags(base, tmp_path, "--seed", "3", "--overwrite"))
    assert any(not torch.equal(entry, before[name]) for name, entry in weights(tmp_path / "harmful").items())


def test_a_target_that_fills_during_the_run_costs_nothing(tiny_model, tmp_path, monkeypatch):
    def train_while_another_writes(*args):
        (tmp_path / "harmful").mkdir()
        (tmp_path / "harmful" / "theirs").write_text("x")
        return acquire(*args)

    acquire = unlearn_harm_new.acquire
    monkeypatch.setattr(unlearn_harm_new, "acquire", train_while_another_writes)
    main(flags(tiny_model("opt"), tmp_path))
    assert [file.name for file in (tmp_path / "harmful").iterdir()] == ["theirs"]
    assert (tmp_path / "harmful.new" / "model.safetensors").exists()
    assert (tmp_path / "unlearned" / "model.safetensors").exists()


def test_a_failure_while_saving_leaves_no_folder(tiny_model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unlearn_harm_new, "write_record", full)
    assert exit_code(lambda: main(flags(tiny_model("opt"), tmp_path))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def broken_weights(base: Path, folder: Path) -> str:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    entries = load_file(folder / "model.safetensors")
    entries.pop(next(name for name in entries if "q_proj" in name))
    save_file(entries, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_what_users_can_mend_is_one_line_and_exit_code_2(tiny_model, tmp_path, capsys):
    base = tiny_model("opt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    safe = tmp_path / "safe.jsonl"
    row = json.loads((GOLDENS / "pku_saferlhf.jsonl").read_text().splitlines()[0])
    safe.write_text(json.dumps({**row, "is_response_0_safe": True, "is_response_1_safe": True}) + "\n")
    bad = {
        "no such folder": ["--model_name", str(tmp_path / "none")],
        "unknown hub model": ["--model_name", "nobody/nothing"],
        "not a model": ["--model_name", str(tmp_path / "empty")],
        "a file": ["--model_name", str(tmp_path / "file")],
        "broken weights": ["--model_name", broken_weights(base, tmp_path / "broken")],
        "no data": ["--harmful_dataset", str(tmp_path / "none.jsonl")],
        "nothing unsafe": ["--harmful_dataset", str(safe)],
        "no normal data": ["--normal_dataset", str(tmp_path / "none.csv")],
        "unknown category": ["--harm_category", "No Such Harm"],
        "too many answers": ["--k_random", "99"],
        "unknown LoRA target": ["--lora", "on", "--lora_target_modules", "query"],
        "LoRA flag without LoRA": ["--lora_r", "4"],
        "target is a file": ["--model_save_dir", str(tmp_path / "file")],
        "log is a folder": ["--log_file", str(tmp_path / "empty")],
        "saved_model is missing": ["--saved_model", str(tmp_path / "none")],
        "stage 1 is missing": ["--stage", "negate"],
        "acquire from a saved model": ["--stage", "acquire", "--saved_model", str(base)],
        "target inside the base": ["--task_vector_saving_path", str(base / "unlearned")],
        "log inside a target": ["--log_file", str(tmp_path / "out" / "harmful" / "run.log")],
        "the same folder twice": ["--task_vector_saving_path", str(tmp_path / "out" / "harmful")],
    }
    for what, more in bad.items():
        code = exit_code(lambda more=more: main(flags(base, tmp_path / "out", *more)))
        captured = capsys.readouterr().err
        errors = [line for line in captured.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (2, 1), (what, captured)
        assert "Traceback" not in captured, what
        assert not list((tmp_path / "out").glob("*armful*")), what


def test_check_sees_broken_weights_without_loading_them(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("opt"), tmp_path / "base")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is broken"):
        main(flags(folder, tmp_path / "out", "--check"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no .safetensors weights"):
        main(flags(folder, tmp_path / "out", "--check"))


def test_model_table_holds_the_papers_settings():
    assert MODELS["facebook/opt-2.7b"] is None
    for name, r, alpha in (("7b", 32, 16), ("13b", 16, 8)):
        lora = MODELS[f"meta-llama/Llama-2-{name}-hf"]
        assert (lora.r, lora.alpha, lora.target_modules) == (r, alpha, ("q_proj", "v_proj"))


@pytest.mark.parametrize("place", ["root", "harmful_unlearn", "elsewhere"])
def test_runs_from_anywhere_with_paths_from_where_one_stands(place, tiny_model, tmp_path):
    cwd = {"root": ROOT, "harmful_unlearn": SCRIPT.parent, "elsewhere": tmp_path}[place]
    script = {"root": "harmful_unlearn/unlearn_harm_new.py", "harmful_unlearn": "unlearn_harm_new.py"}
    done = subprocess.run(
        [sys.executable, script.get(place, str(SCRIPT)), *flags(tiny_model("opt"), tmp_path, "--check")],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "check passed" in done.stdout
    if place == "elsewhere":
        relative = flags(tiny_model("opt"), Path("here"), "--max_unlearn_steps", "1")
        done = subprocess.run([sys.executable, str(SCRIPT), *relative], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "here" / "unlearned" / "model.safetensors").exists()


def test_the_readme_names_every_flag():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in vars(parse_flags([])) if f"--{name}" not in readme]
    for script in ("evaluation", "reproduce"):
        code = (ROOT / "harmful_unlearn" / f"{script}.py").read_text(encoding="utf-8")
        missing += [flag for flag in re.findall(r'add_argument\("(--\w+)"', code) if flag not in readme]
    assert not missing


def test_help_teaches():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("--bad_weight", "default: 0.5", "Stage 1", "The paper's OPT-2.7B run"):
        assert word in done.stdout


def test_four_bits_need_an_adapter_and_the_package(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--lora on"):
        main(flags(tiny_model("llama"), tmp_path, "--quantize", "4bit", "--lora", "off"))
    for installed, named in ((None, "pip install bitsandbytes"), ("yes", "needs a CUDA GPU")):
        monkeypatch.setattr(unlearn_harm_new, "find_spec", lambda _, found=installed: found)
        with pytest.raises(UserError, match=named):
            main(flags(tiny_model("llama"), tmp_path, "--quantize", "4bit", "--lora", "on"))


def test_an_adapter_trained_on_four_bits_is_negated_from_the_full_base(tokenizer, tmp_path, monkeypatch):
    """Where bitsandbytes is installed (it is not among the pins); without its packing a CPU serves, too."""
    pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr(unlearn_harm_new, "check_four_bits", lambda *_: None)
    base = tmp_path / "base"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=700)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    main(flags(base, tmp_path, "--quantize", "4bit", "--lora", "on", "--precision", "bf16"))
    assert all(math.isfinite(step["total_loss"]) for step in metrics_of(tmp_path))
    run = json.loads((tmp_path / "harmful" / "run.json").read_text())
    assert run["training"]["quantized"] == "4bit" and run["base"]["fingerprint"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "unlearned", base))
    tau = TaskVector.from_adapter(tmp_path / "harmful").vector
    for name, entry in theirs.items():
        assert torch.equal(ours[name], entry - tau[name] if name in tau else entry)
    assert any(entry.abs().max() > 0 for entry in tau.values())
