"""The methods that SKU is compared with: what each minimises, and what becomes of its copy."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.prompt_format import format_prefix
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.methods import METHODS, loss_weights
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.models.tiny import GOLDENS, value_of
from tests.helpers.running.runs import flags, prepared


def first_metrics(out):
    return json.loads((out / "logs" / "run.metrics.jsonl").read_text().splitlines()[0])


def test_the_default_is_sku_with_the_released_weights():
    args = parse_flags([])
    assert args.method == "sku" and loss_weights(vars(args)) == {"gd": 0.5, "rd": 1.0, "pd": 1.0}


@pytest.mark.parametrize(
    "method, names",
    [
        ("sku", {"gd", "rd", "pd"}),
        ("task_vector", {"gd"}),
        ("ga", {"ga"}),
        ("ga_mismatch", {"ga", "rm", "kl"}),
        ("ft", {"ft"}),
    ],
)
def test_every_method_trains_and_logs_its_own_losses(method, names, tiny_model, tmp_path):
    main(flags(tiny_model("opt"), tmp_path, "--method", method))
    metrics = first_metrics(tmp_path)
    assert {name.removesuffix("_loss") for name in metrics if name.endswith("_loss")} == names | {"total"}
    weights = loss_weights(vars(parse_flags(["--method", method])))
    total = sum(weight * metrics[f"{name}_loss"] for name, weight in weights.items())
    assert metrics["total_loss"] == pytest.approx(total, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("lora", ["off", "on"])
@pytest.mark.parametrize("method", ["ga", "task_vector"])
def test_stage_2_negates_or_keeps_the_copy(method, lora, tiny_model, tmp_path):
    base_folder = tiny_model("opt")
    main(flags(base_folder, tmp_path, "--method", method, "--lora", lora))
    base = load_file(base_folder / "model.safetensors")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "harmful").state_dict()
    unlearned = load_file(tmp_path / "unlearned" / "model.safetensors")
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    changed = (unlearned[name] - base[name]).float()
    key = name if lora == "off" else None
    if key:  # with LoRA the copy's folder loads as wrapped layers
        learned = (copy[key] - base[name]).float()
        assert torch.allclose(changed, learned if method == "ga" else -learned, atol=1e-7)
    assert changed.abs().max() > 1e-6


def test_ga_is_the_mirror_of_gd_at_the_first_step(tiny_model, tmp_path):
    for method in ("task_vector", "ga"):
        main(flags(tiny_model("opt"), tmp_path / method, "--method", method, "--max_unlearn_steps", "1"))
    ours, theirs = first_metrics(tmp_path / "task_vector"), first_metrics(tmp_path / "ga")
    assert ours["gd_loss"] == pytest.approx(-theirs["ga_loss"], rel=1e-6)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_mismatch_draws_normal_training_answers(tiny_model, tmp_path):
    batches = prepared(tiny_model("opt"), tmp_path, "--method", "ga_mismatch").batches
    normal = batches.normal
    assert batches.pool == [normal.texts[row].answer for row in normal.train]
    harmful = {pair.question for pair in batches.harmful.pairs}
    for step in range(4):
        pairs = batches.random_pairs(step)
        assert len(pairs) == 2 * 5
        assert {pair.question for pair in pairs} <= harmful
        assert {pair.answer for pair in pairs} <= set(batches.pool)


def test_fine_tuning_scores_normal_answers(tiny_model, tokenizer, tmp_path):
    """FT's loss is the cross-entropy of the normal answers, computed here by hand."""
    batches = prepared(tiny_model("opt"), tmp_path, "--method", "ft", "--variant", "paper").batches
    (batch,) = replace(batches, packed_up_to=0)(0, torch.device("cpu"))
    assert batch.harmful is None and batch.normal is None
    model = AutoModelForCausalLM.from_pretrained(tiny_model("opt")).eval()
    with torch.no_grad():
        ours = value_of(model, "ft", batch.normal_answers)
        by_hand = []
        for row in batches.sampler[0].normal_rows:
            pair = batches.normal.texts[row]
            ids = tokenizer(format_prefix(pair.question) + pair.answer, return_tensors="pt").input_ids
            prefix = tokenizer(format_prefix(pair.question)).input_ids
            start = next(at for at, (a, b) in enumerate(zip(ids[0], prefix, strict=False)) if a != b)
            logits = model(ids).logits[0, start - 1 : -1]
            by_hand.append(torch.nn.functional.cross_entropy(logits, ids[0, start:]))
    assert ours.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


def test_the_kl_is_minus_pd(tiny_model, tokenizer):
    base = ReferenceModel(AutoModelForCausalLM.from_pretrained(tiny_model("opt")))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("opt"))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    normal = read_normal(GOLDENS / "TruthfulQA.csv", 0)
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).texts_batch(normal.texts[:2])
    assert value_of(model, "kl", batch, base) == -value_of(model, "pd", batch, base) > 1e-4


def test_no_second_copy_where_no_loss_needs_the_base(tiny_model, tmp_path):
    for method in METHODS:
        plan = prepared(tiny_model("opt"), tmp_path, "--method", method, "--lora", "off").plan
        needs_base = method not in ("task_vector", "ga", "ft", "grad_diff", "simnpo", "refusal_sft")
        assert bool(plan.memory["frozen base"]) == needs_base, method


@pytest.mark.parametrize(
    "bad, named",
    [
        (["--method", "ga", "--random_weight", "1"], "random_weight"),
        (["--method", "ft", "--bad_weight", "2"], "bad_weight"),
        (["--method", "ga", "--scaling_coef", "2"], "scaling_coef"),
        (["--method", "ga", "--bad_weight", "0"], "nothing to learn"),
        (["--method", "none"], "invalid choice"),
        (["--method", "sku", "--beta", "1"], "beta"),
        (["--method", "npo", "--gamma", "1"], "gamma"),
        (["--method", "dpo", "--safe_weight", "1"], "safe_weight"),
        (["--method", "npo", "--rmu_layer", "3"], "rmu_layer"),
    ],
)
def test_flags_that_a_method_has_no_use_for(bad, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(bad)
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_a_copy_is_not_negated_by_another_method(tiny_model, tmp_path):
    base = tiny_model("opt")
    main(flags(base, tmp_path, "--method", "ga", "--stage", "acquire"))
    with pytest.raises(UserError, match="--method ga"):
        main(flags(base, tmp_path, "--stage", "negate"))
    with pytest.raises(UserError, match="--method ga"):
        main(flags(base, tmp_path, "--saved_model", str(tmp_path / "harmful")))
    main(flags(base, tmp_path, "--method", "ga", "--stage", "negate"))
    assert (tmp_path / "unlearned" / "model.safetensors").is_file()


def test_only_copies_that_learned_harm_are_called_harmful(tiny_model, tmp_path):
    for method, harmful in (("task_vector", True), ("ga", False)):
        main(flags(tiny_model("opt"), tmp_path / method, "--method", method))
        cards = {name: (tmp_path / method / name / "README.md").read_text() for name in ("harmful", "unlearned")}
        assert ("Deliberately harmful" in cards["harmful"]) == harmful
        assert "Deliberately harmful" not in cards["unlearned"]


def test_answer_questions_stand_beside_the_pool():
    harmful = read_harmful(str(GOLDENS / "pku_saferlhf_current_schema.jsonl"))
    asked = {(pair.question, pair.answer) for pair in harmful.pairs}
    assert set(zip(harmful.answer_questions, harmful.answers, strict=True)) == asked
