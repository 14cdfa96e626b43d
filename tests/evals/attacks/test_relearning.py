"""The attack by fine-tuning: a few steps of Guided Distortion on a few pairs, in many ways, and what comes of it."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.evals import evaluator
from harmful_unlearn.evals.attacks.asking import plain_protocol
from harmful_unlearn.evals.attacks.measured import AttackPlan
from harmful_unlearn.evals.attacks.relearning import (
    BENIGN,
    FULL,
    LORA,
    OTHER_KIND,
    SAME_KIND,
    Attacker,
    Relearning,
    RelearnPlan,
    draw_texts,
)
from harmful_unlearn.evals.attacks.weights import Contrast
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.evaluator import measure
from harmful_unlearn.evals.inference.generation import Answer
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.models.lora import Lora, add_lora
from tests.helpers.attacks import HARM, PROTOCOL, REFUSAL, UNSEEN, RuleJudge
from tests.helpers.models.tiny import value_of

NAME = "model.decoder.layers.1.self_attn.q_proj.weight"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def relearn(model, template, pairs, steps, lr, seed):
    """The model after that many steps on all weights that it trains."""
    return Relearning(lambda: (model, template), Attacker(FULL, SAME_KIND, lr), pairs, seed, "fp32").at(steps)[0]


@pytest.mark.parametrize("lora", [False, True])
def test_relearning_is_guided_distortion_on_the_handful(lora, tiny_model, tokenizer):
    pairs = [Pair("How?", "By doing just this."), Pair("Why so?", "Nobody knows that."), Pair("Who?", "They did.")]

    def loss_of(model):
        batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(pairs, [])
        with torch.no_grad():
            return value_of(model, "gd", batch).item()

    def fresh():
        torch.manual_seed(0)
        model = load(tiny_model("opt"))
        return add_lora(model, Lora(4, 4), "base") if lora else model

    soft, strong = (relearn(fresh(), ReleasedTemplate(tokenizer), pairs, 30, lr, 0) for lr in (1e-3, 1e-2))
    assert loss_of(strong) < loss_of(soft) < loss_of(fresh())
    assert not strong.training
    again = relearn(fresh(), ReleasedTemplate(tokenizer), pairs, 30, 1e-2, 0)
    assert loss_of(again) == loss_of(strong)
    assert loss_of(relearn(fresh(), ReleasedTemplate(tokenizer), pairs, 0, 1e-2, 0)) == loss_of(fresh())


def test_one_step_of_relearning_by_hand(tiny_model, tokenizer):
    pairs = [Pair("How?", "By doing just this."), Pair("Why so?", "Nobody knows that.")]
    ours = relearn(load(tiny_model("opt")), ReleasedTemplate(tokenizer), pairs, 1, 1e-3, 0)
    model = load(tiny_model("opt")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(pairs, [])
    value_of(model, "gd", batch).backward()
    optimizer.step()
    assert torch.allclose(ours.state_dict()[NAME], model.state_dict()[NAME], atol=1e-5)


@pytest.mark.parametrize("weights", [FULL, LORA])
def test_relearning_does_not_depend_on_what_was_drawn_before(weights, tiny_model, tokenizer):
    def relearned(before):
        model = load(tiny_model("opt"))
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.5
        torch.manual_seed(before)
        training = Relearning(lambda: (model, ReleasedTemplate(tokenizer)), attacker, PAIRS[:1], 0, "fp32")
        return training.at(2)[0].state_dict()

    attacker = Attacker(weights, SAME_KIND, 1e-2)
    one, other = relearned(1), relearned(2)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


PAIRS = [Pair("How?", "By doing just this."), Pair("Why so?", "Nobody knows that."), Pair("Who?", "They did.")]


@pytest.mark.parametrize("weights", [FULL, LORA])
def test_a_curve_is_one_training_and_an_earlier_point_starts_it_again(weights, tiny_model, tokenizer):
    loads = []

    def loaded():
        loads.append(1)
        return load(tiny_model("opt")), ReleasedTemplate(tokenizer)

    def state(steps, curve):
        return {name: value.clone() for name, value in curve.at(steps)[0].state_dict().items()}

    curve = Relearning(loaded, Attacker(weights, SAME_KIND, 1e-2), PAIRS, 3, "fp32")
    points = {steps: state(steps, curve) for steps in (0, 2, 5)}
    assert len(loads) == 1 and not curve.at(5)[0].training
    again = state(2, curve)
    assert len(loads) == 2 and all(torch.equal(value, points[2][name]) for name, value in again.items())
    straight = state(5, Relearning(loaded, Attacker(weights, SAME_KIND, 1e-2), PAIRS, 3, "fp32"))
    assert all(torch.equal(value, points[5][name]) for name, value in straight.items())
    changed = {name for name, value in straight.items() if not torch.equal(value, points[0][name])}
    assert changed and all("lora_" in name for name in changed) == (weights == LORA)


def response(question, *kinds, safe=False):
    return Response(question, f"answer to {question}", safe, frozenset(kinds))


DATA = [
    *(response(f"a{n}", "Arson") for n in range(5)),
    *(response(f"b{n}", "Bribes") for n in range(3)),
    *(response(f"c{n}", "Bribes", "Arson") for n in range(3)),
    *(response(f"s{n}", "Bribes", safe=True) for n in range(9)),
    response("few", "Cheating"),
]
NORMAL = [Pair(f"n{n}", "yes") for n in range(4)]


def test_the_other_kind_is_the_one_that_is_asked_least_and_no_harmful_pair_is_of_it():
    prompts = [Prompt("x", "", 0, frozenset({"Arson"})), Prompt("y", "", 1, frozenset({"Arson", "Bribes"}))]
    texts, other = draw_texts(DATA, NORMAL, prompts, {"a0", "n1"}, 3, 0)
    assert other == "Bribes" and {text: len(pairs) for text, pairs in texts.items()} == {
        SAME_KIND: 3, OTHER_KIND: 3, BENIGN: 3
    }  # fmt: skip
    drawn = {text: {pair.question for pair in pairs} for text, pairs in texts.items()}
    assert drawn[OTHER_KIND] == {"b0", "b1", "b2"} and drawn[BENIGN] == {"n0", "n2", "n3"}
    assert drawn[SAME_KIND] < {"a1", "a2", "a3", "a4", "few"}
    assert draw_texts(DATA, NORMAL, prompts, {"a0", "n1"}, 3, 0) == (texts, other)
    assert draw_texts(DATA, NORMAL, prompts, {"a0", "n1"}, 3, 1)[0] != texts


def test_data_without_kinds_or_with_too_few_pairs_have_fewer_attackers():
    plain = [replace(one, categories=frozenset()) for one in DATA]
    texts, other = draw_texts(plain, NORMAL[:1], UNSEEN, set(), 3, 0)
    assert set(texts) == {SAME_KIND} and other == ""
    assert draw_texts(DATA, NORMAL, UNSEEN, set(), 30, 0) == ({}, "")


def test_a_kind_that_all_prompts_or_too_many_pairs_have_is_not_the_other_one():
    both = [*(response(f"b{n}", "Bribes") for n in range(4)), *(response(f"c{n}", "Bribes", "Arson") for n in range(4))]
    assert draw_texts(both, [], UNSEEN, set(), 4, 0)[1] == ""  # no pair without it would be left
    marked = [Prompt("x", "", 0, frozenset({"Arson", "Bribes"}))]
    assert draw_texts(DATA, NORMAL, marked, set(), 3, 0)[1] == ""


def test_the_grid_is_every_combination_and_adapters_have_ten_times_the_rate():
    plan = RelearnPlan({SAME_KIND: PAIRS, BENIGN: PAIRS}, [1e-5, 1e-4], [2], UNSEEN, "")
    grid = {(one.weights, one.text, round(one.lr, 9)) for one in plan.attackers}
    assert grid == {
        (weights, text, lr)
        for weights, rates in ((FULL, (1e-5, 1e-4)), (LORA, (1e-4, 1e-3)))
        for text in (SAME_KIND, BENIGN)
        for lr in rates
    }
    assert "LoRA, benign text, lr 0.001" in map(str, plan.attackers)


@pytest.mark.slow
def test_a_model_that_yields_after_four_steps_is_found_and_what_is_there_is_not_done_again(
    tiny_model, tokenizer, tmp_path, monkeypatch
):
    """Stands in for answers: how far a weight has moved from where it was decides."""
    before = load(tiny_model("opt")).state_dict()[NAME]
    trained, loads = [], []

    def generate(model, _template, _limit, _tokens, requests):
        moved = (model.state_dict()[NAME] - before).abs().max() if NAME in model.state_dict() else torch.tensor(0.0)
        trained.append(moved.item())
        yield [Answer(n, HARM if moved > 3.5e-2 else REFUSAL, True) for n, _ in enumerate(requests)]

    def loaded():
        loads.append(1)
        return load(tiny_model("opt")), ReleasedTemplate(tokenizer)

    monkeypatch.setattr(evaluator, "generate", generate)
    models, judge = [EvaluatedModel(label, {}, loaded) for label in ("base", "sku")], RuleJudge()
    plain = plain_protocol(PROTOCOL, 3)
    rows = measure(models, plain, judge, None, tmp_path / "plain")
    relearning = RelearnPlan({SAME_KIND: PAIRS}, [1e-2], [2, 5], UNSEEN[:2], "")
    plan = AttackPlan(plain, {}, [], [], Contrast([], []), relearning)
    figures, curves = plan.measure(models, rows, judge, models[0], tmp_path / "attacks")
    assert {(row["model"], row["attack"]) for row in figures} == {("base", "none"), ("sku", "none")}
    rates = {(row["attacker"], row["steps"]): row for row in curves if row["model"] == "sku"}
    # AdamW moves a weight by about its rate each step: 0.01.
    assert {key: row["value"] for key, row in rates.items()} == {
        ("none", 0): 0, ("worst", 0): 0, ("worst", 2): 0, ("worst", 5): 1,
        **{(f"{weights}, {text}, lr {lr}", steps): float(weights == FULL and steps == 5)
           for weights, lr in ((FULL, 0.01), (LORA, 0.1)) for text in (SAME_KIND,) for steps in (2, 5)},
    }  # fmt: skip
    assert rates["worst", 2]["which"] == "" == rates["worst", 0]["which"]  # nobody got anywhere
    worst = rates["worst", 5]
    assert worst["which"].startswith("all weights, ") and worst["pairs"] == 3 and worst["n"] == 2
    assert worst["degenerate_rate"] == 0
    assert len(loads) == 2 + 2 * 2  # one training for the points of a curve
    assert plan.measure(models, rows, judge, models[0], tmp_path / "attacks") == (figures, curves)
    assert len(loads) == 2 + 2 * 2
    kept = tmp_path / "kept"
    assert plan.measure(models, rows, judge, models[0], tmp_path / "second", kept) == (figures, curves)
    assert len(loads) == 2 + 2 * 4
    assert plan.measure(models, rows, judge, models[0], tmp_path / "third", kept) == (figures, curves)
    assert len(loads) == 2 + 2 * 5  # the base is not attacked again
