"""Losses at the landing point: gradients against autograd through theta', and the flags and data around them."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import task_vector
from harmful_unlearn.data.batch_sampler import BatchSampler
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch, StepBatches
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.prompt_sets import touched_questions
from harmful_unlearn.losses.landing import LandingPoint
from harmful_unlearn.losses.methods import loss_weights
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.losses.terms import reads
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.models.tiny import GOLDENS
from tests.helpers.running.runs import flags, metrics_of, prepared

PAIRS = [Pair("How do I hide a gnome?", "Carry it to the shed."), Pair("Short?", "Yes")]
SAFE = [Pair(pair.question, "Please leave it where it is.") for pair in PAIRS]
WEIGHTS = {"gd": 1.0, "rd": 0.5, "lp": 0.3, "sa": 0.2}
ALPHA = 3.0


def moved(folder, lora: bool):
    """A copy some way from its base, and the base."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    base = ReferenceModel(AutoModelForCausalLM.from_pretrained(folder))
    if lora:
        model = add_lora(model, Lora(4, 4), "base")
        base = ReferenceModel(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += (0.3 if "lora_B" in name else 0.02) * torch.randn_like(parameter)
    return model.train(), base


class Plain(nn.Module):
    """The losses by their formulas, from whole logits."""

    def __init__(self, model, base):
        super().__init__()
        self.model, self.base = model, [base]

    def logits(self, batch):
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return output[batch.row, batch.position]

    def forward(self, name, batch):
        logits = self.logits(batch)
        if name != "lp":
            entropy = F.cross_entropy(logits[batch.index], batch.target, reduction="none")
            return batch.weights["random_answers" if name == "rd" else "own_answer"] @ entropy
        with torch.no_grad(), self.base[0].active() as frozen:
            log_p = Plain(frozen, None).logits(batch).log_softmax(-1)
        return batch.weights["text"] @ (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("architecture", ["opt", "llama", "qwen2"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_gradient_is_autograds_through_the_landing_point(architecture, lora, fused, tiny_model, tokenizer, monkeypatch):
    if not fused:
        monkeypatch.setattr("harmful_unlearn.losses.objective.has_plain_head", lambda _: False)
    folder = tiny_model(architecture)
    model, base = moved(folder, lora)
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    texts = StepBatch(
        collator.answers_batch(PAIRS, ["Blame the dog."]), collator.texts_batch(PAIRS), collator.answers_batch(SAFE, [])
    )
    objective = Objective(model, WEIGHTS, base)
    loss, each = objective(model, texts)
    loss.backward()
    with LandingPoint(model, base, ALPHA).reached() as chain_rule:
        loss, at_landing = objective.at_landing(model, texts)
        (chain_rule * loss).backward()
    each |= at_landing
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ours = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()

    if lora:  # theta' = theta_o + alpha' * scale * B @ A with alpha' = -alpha
        landed = {name: -ALPHA * weight if "lora_B" in name else weight for name, weight in trained.items()}
    else:
        origin = dict(base.model.named_parameters())
        landed = {name: origin[name] - ALPHA * (weight - origin[name]) for name, weight in trained.items()}
    plain = Plain(model, base)
    by_hand = {
        "gd": plain("gd", texts.harmful),
        "rd": plain("rd", texts.harmful),
        **{
            name: torch.func.functional_call(plain, {f"model.{key}": one for key, one in landed.items()}, (name, batch))
            for name, batch in (("lp", texts.normal), ("sa", texts.safe))
        },
    }
    total = sum(WEIGHTS[name] * value for name, value in by_hand.items())
    expected = dict(zip(trained, torch.autograd.grad(total, trained.values()), strict=True))
    for name, value in by_hand.items():
        torch.testing.assert_close(each[name], value.detach(), rtol=1e-4, atol=1e-5)
    assert each["lp"] > 1e-4 and each["sa"] > 1
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() < 2e-4 * largest, name


@pytest.mark.parametrize("lora", [False, True])
def test_the_copy_comes_back_to_the_bit(lora, tiny_model):
    model, base = moved(tiny_model("opt"), lora)
    landing = LandingPoint(model, base, ALPHA)
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    ids = torch.tensor([[2, 7, 9]])
    said = model(ids).logits
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), landing.reached():
            assert not torch.equal(model(ids).logits, said)
            1 / 0  # noqa: B018
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    assert torch.equal(model(ids).logits, said)


def test_lora_costs_no_copy_and_full_fine_tuning_one(tiny_model):
    model, base = moved(tiny_model("opt"), lora=True)
    landing = LandingPoint(model, base, ALPHA)
    with landing.reached():
        assert not landing._saved
    model, base = moved(tiny_model("opt"), lora=False)
    landing = LandingPoint(model, base, ALPHA)
    with landing.reached():
        aside = [one.data_ptr() for one in landing._saved]
    with landing.reached():
        assert [one.data_ptr() for one in landing._saved] == aside  # the same memory at every step
    assert len(aside) == len(list(model.parameters()))


@pytest.mark.parametrize("method", ["land", "lands"])
@pytest.mark.parametrize("lora", ["on", "off"])
def test_the_script_ships_the_point_that_was_preserved(method, lora, tiny_model, tmp_path, monkeypatch):
    """Full fine-tuning: the weights at which the losses of a last step would be taken, to the bit."""
    seen = []
    reached = LandingPoint.reached

    def spy(self):
        seen.append(self)
        return reached(self)

    monkeypatch.setattr(LandingPoint, "reached", spy)
    base = tiny_model("opt")
    main(flags(base, tmp_path, "--method", method, "--lora", lora, "--lr", "1e-3"))
    steps = metrics_of(tmp_path)
    assert len(seen) == len(steps) and all(step["lp_loss"] >= 0 for step in steps)
    assert steps[0]["lp_loss"] < 1e-6 < steps[-1]["lp_loss"]
    assert all(("sa_loss" in step) == (method == "lands") for step in steps)
    weights = loss_weights(vars(parse_flags(["--method", method])))
    for step in steps:
        total = sum(weights[name] * step[f"{name}_loss"] for name in weights if step[f"{name}_loss"] is not None)
        assert step["total_loss"] == pytest.approx(total, rel=1e-5)
    run = json.loads((tmp_path / "unlearned" / "run.json").read_text())
    assert run["scaling_coef"] == {"land": 3.0, "lands": 4.0}[method]
    if lora == "off":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "harmful")
        point = LandingPoint(model, ReferenceModel(AutoModelForCausalLM.from_pretrained(base)), run["scaling_coef"])
        shipped = load_file(tmp_path / "unlearned" / "model.safetensors")
        with point.reached():
            assert all(torch.equal(model.state_dict()[name], entry) for name, entry in shipped.items())


def test_presets_give_way_to_flags():
    args = parse_flags(["--method", "lands"])
    assert (args.lr, args.max_unlearn_steps, args.scaling_coef, args.preserve_at) == (1e-4, 200, 4.0, "landing")
    assert loss_weights(vars(args)) == {"gd": 1.0, "rd": 0.0, "lp": 0.3, "sa": 0.1}
    args = parse_flags(["--method", "land", "--normal_weight", "1", "--scaling_coef", "2", "--lr", "1e-3"])
    assert loss_weights(vars(args)) == {"gd": 1.0, "rd": 0.0, "lp": 1.0} and (args.scaling_coef, args.lr) == (2.0, 1e-3)
    args = parse_flags(["--preserve_at", "landing"])
    assert loss_weights(vars(args)) == {"gd": 0.5, "rd": 1.0, "lp": 1.0} and args.max_unlearn_steps == 1000


@pytest.mark.parametrize(
    "wrong",
    [
        ["--method", "ga", "--preserve_at", "landing"],
        ["--method", "ft", "--safe_weight", "1"],
        ["--method", "task_vector", "--preserve_at", "landing"],
        ["--safe_weight", "-1"],
        ["--method", "land", "--scaling_coef", "0"],
        ["--preserve_at", "base"],
    ],
)
def test_what_makes_no_sense_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(wrong)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err


def test_safe_answers_are_those_beside_unsafe_ones(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [("q0", "bad", False, "good", True), ("q1", "bad", False, "worse", False), ("q2", " ", True, "bad", False)]
    columns = ("prompt", "response_0", "is_response_0_safe", "response_1", "is_response_1_safe")
    file.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    harmful = read_harmful(str(file))
    assert [pair.answer for pair in harmful.pairs] == ["bad", "bad", "worse", "bad"]
    assert harmful.safe_answers == ["good", None, None, None]


def test_a_step_has_the_safe_answers_of_its_own_prompts(tokenizer):
    harmful = read_harmful(str(GOLDENS / "pku_saferlhf_current_schema.jsonl"))
    normal = read_normal(GOLDENS / "TruthfulQA.csv", 0)
    order = BatchSampler(range(len(harmful.pairs)), normal.train, len(harmful.answers), 2, 3, 5)
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    batches = StepBatches(collator, order, harmful, normal, reads({"gd", "lp", "sa"}))
    found = [batches(step, torch.device("cpu"))[0] for step in range(order.batches_per_epoch)]
    assert any(texts.safe is None for texts in found) or all(harmful.safe_answers)
    for step, texts in enumerate(found):
        rows = [row for row in order[step].harmful_rows if harmful.safe_answers[row]]
        pairs = [Pair(harmful.pairs[row].question, harmful.safe_answers[row]) for row in rows]
        if pairs:
            assert torch.equal(texts.safe.input_ids, collator.answers_batch(pairs, []).input_ids)
        else:
            assert texts.safe is None
    trained, touched = touched_questions(order, harmful, reads({"sa"}), 1)
    assert not trained and touched == {harmful.pairs[row].question for row in order[0].harmful_rows}


def test_data_without_safe_answers_name_the_other_method(tiny_model, tmp_path):
    rows = [json.loads(line) for line in (GOLDENS / "pku_saferlhf.jsonl").read_text().splitlines()]
    file = tmp_path / "harmful.jsonl"
    file.write_text(
        "".join(json.dumps({**row, "is_response_0_safe": False, "is_response_1_safe": False}) + "\n" for row in rows)
    )
    arguments = flags(tiny_model("opt"), tmp_path, "--harmful_dataset", str(file))
    with pytest.raises(UserError, match="--method land"):
        main([*arguments, "--method", "lands"])
    main([*arguments, "--method", "land", "--stage", "acquire"])


@pytest.fixture(scope="module")
def landed(tiny_model, tmp_path_factory):
    """Stage 1 of lands, trained for a scale of 4: every weight, and an adapter."""
    out = tmp_path_factory.mktemp("landed")
    for lora in ("on", "off"):
        main(flags(tiny_model("opt"), out / lora, "--method", "lands", "--lora", lora))
    return out


def negated(landed, tiny_model, out, *more, lora="off"):
    task_vector.main(
        ["--base", str(tiny_model("opt")), "--finetuned", str(landed / lora / "harmful"), "--output", str(out), *more]
    )


@pytest.mark.parametrize("scale", [["1"], ["3"], ["4", "3"], ["-4"]])
def test_another_scale_than_the_trained_one_is_refused(scale, landed, tiny_model, tmp_path):
    with pytest.raises(UserError, match="land at --scaling_coef 4.*--force"):
        negated(landed, tiny_model, tmp_path / "out", "--scaling_coef", *scale)
    assert not (tmp_path / "out").exists()
    negated(landed, tiny_model, tmp_path / "out", "--scaling_coef", *scale, "--force")


def test_the_trained_scale_and_the_copy_itself_are_not(landed, tiny_model, tmp_path):
    negated(landed, tiny_model, tmp_path / "a", "--scaling_coef", "4")
    negated(landed, tiny_model, tmp_path / "b", "--scaling_coef", "2", "--coefs", "2")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(entry, theirs[name]) for name, entry in ours.items())
    negated(landed, tiny_model, tmp_path / "c", "--scaling_coef", "-1", lora="on")


def test_a_saved_vector_and_an_adapter_remember_their_scale(landed, tiny_model, tmp_path):
    base = ["--base", str(tiny_model("opt"))]
    task_vector.main([*base, "--finetuned", str(landed / "off" / "harmful"), "--save_vector", str(tmp_path / "v")])
    with pytest.raises(UserError, match="land at"):
        task_vector.main([*base, "--vector", str(tmp_path / "v"), "--output", str(tmp_path / "o")])
    adapter = ["--finetuned", str(landed / "on" / "harmful"), "--adapter_output", str(tmp_path / "adapter")]
    with pytest.raises(UserError, match="land at"):
        task_vector.main([*base, *adapter])
    task_vector.main([*base, *adapter, "--scaling_coef", "4"])


def test_a_saved_vector_counts_with_its_coefficient(landed, tiny_model, tmp_path):
    """Half the vector at 8 is the vector at 4."""
    base, half = ["--base", str(tiny_model("opt"))], str(tmp_path / "half")
    made = ["--finetuned", str(landed / "off" / "harmful"), "--coefs", "0.5", "--save_vector", half]
    task_vector.main([*base, *made])
    with pytest.raises(UserError, match="give 8"):
        task_vector.main([*base, "--vector", half, "--output", str(tmp_path / "o"), "--scaling_coef", "4"])
    task_vector.main([*base, "--vector", half, "--output", str(tmp_path / "o"), "--scaling_coef", "8"])


def test_nothing_lands_without_a_weight(tiny_model, tmp_path):
    main(flags(tiny_model("opt"), tmp_path, "--method", "land", "--normal_weight", "0", "--stage", "acquire"))
    task_vector.main(
        [
            "--base",
            str(tiny_model("opt")),
            "--finetuned",
            str(tmp_path / "harmful"),
            "--output",
            str(tmp_path / "out"),
            "--scaling_coef",
            "1",
        ]
    )


def test_the_script_refuses_another_scale_in_stage_2(landed, tiny_model, tmp_path):
    saved = str(landed / "off" / "harmful")
    arguments = flags(tiny_model("opt"), tmp_path, "--method", "lands", "--saved_model", saved)
    for more in ([], ["--check"]):
        with pytest.raises(UserError, match="land at --scaling_coef 4"):
            main([*arguments, "--scaling_coef", "2", *more])
    main(arguments)
    assert (tmp_path / "unlearned" / "model.safetensors").is_file()


def test_the_plan_counts_the_saved_theta(tiny_model, tmp_path):
    def memory(*more):
        plan = prepared(tiny_model("opt"), tmp_path, "--precision", "bf16", *more).plan
        return plan.memory, plan.parameters

    sku, parameters = memory()
    land, _ = memory("--method", "land")
    assert sku["frozen base"] == 2 * parameters and "theta, saved" not in sku
    assert (land["frozen base"], land["theta, saved"]) == (4 * parameters, 4 * parameters)
    assert "theta, saved" not in memory("--method", "land", "--lora", "on")[0]
