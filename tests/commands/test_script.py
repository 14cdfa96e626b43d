"""The script: both stages on tiny models, what they write, and how the script refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.models.tiny import GOLDENS
from tests.helpers.running.runs import flags, metrics_of, weights

SCRIPT = ROOT / "harmful_unlearn" / "unlearn_harm_new.py"
METRICS = {
    "step", "gd_loss", "rd_loss", "pd_loss", "total_loss", "lr", "grad_norm", "tokens", "seconds",
}  # fmt: skip


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


def test_variants_differ(tiny_model, tmp_path):
    base = tiny_model("opt")
    for variant in ("released", "paper"):
        main(flags(base, tmp_path / variant, "--stage", "acquire", "--variant", variant))
    released, paper = (metrics_of(tmp_path / variant)[0] for variant in ("released", "paper"))
    assert abs(released["rd_loss"] - paper["rd_loss"]) > 1e-3


def test_kl_above_a_nat_warns_once(tiny_model, tmp_path, capsys):
    main(flags(tiny_model("opt"), tmp_path, "--lr", "0.1", "--normal_weight", "5", "--max_unlearn_steps", "8"))
    said = capsys.readouterr().out
    assert said.count("warning: step") == 1 and "or lower --normal_weight" in said
    assert max(-m["pd_loss"] for m in metrics_of(tmp_path)) > 1


def test_a_full_target_is_refused_unless_overwrite(tiny_model, tmp_path):
    base = tiny_model("opt")
    main(flags(base, tmp_path))
    before = weights(tmp_path / "harmful")
    with pytest.raises(UserError, match="--overwrite"):
        main(flags(base, tmp_path, "--seed", "3"))
    assert all(torch.equal(entry, before[name]) for name, entry in weights(tmp_path / "harmful").items())
    main(flags(base, tmp_path, "--seed", "3", "--overwrite"))
    assert any(not torch.equal(entry, before[name]) for name, entry in weights(tmp_path / "harmful").items())


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


@pytest.mark.slow
def test_runs_in_its_own_folder(tiny_model, tmp_path):  # the demo runs it in the repository's
    words = [SCRIPT.name, *flags(tiny_model("opt"), tmp_path, "--check")]
    done = subprocess.run([sys.executable, *words], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "check passed" in done.stdout


@pytest.mark.slow
def test_runs_from_elsewhere_with_paths_from_where_one_stands(tiny_model, tmp_path):
    words = [str(SCRIPT), *flags(tiny_model("opt"), Path("here"), "--max_unlearn_steps", "1")]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "unlearned" / "model.safetensors").exists()
