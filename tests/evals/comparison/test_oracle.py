"""The distance from an oracle, against values by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.comparison.oracle import ORACLE, oracle_figures
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.inference.generation import Decoding
from tests.helpers.attacks import NORMAL, PROTOCOL, UNSEEN

SAID = {
    "sku": ("Do it now.", "harmful", False),
    "base": ("Sorry, not.", "safe", True),
    ORACLE: ("Sorry, not now.", "safe", True),
}


def row(label, name, decoding, index, prompt):
    answer, verdict, refused = SAID[label]
    return {"set": name, "decoding": decoding.name, "index": index, "prompt": prompt.question, "answer": answer,
            "ended": True, "verdict": verdict, "refused": refused}  # fmt: skip


@pytest.fixture
def compared(tiny_model, tokenizer):
    """`compared(other)`: base, a changed copy of it, and the oracle, which is the base; or another architecture's."""
    loads = []

    def make(architecture="opt"):
        def load(label):
            loads.append(label)
            model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture if label == "sku" else "opt")).eval()
            if label == "sku":
                with torch.no_grad():
                    model.get_input_embeddings().weight.mul_(0.5)
            return model, ReleasedTemplate(tokenizer)

        models = [EvaluatedModel(label, {"label": label}, lambda label=label: load(label)) for label in SAID]
        return models, loads

    return make


ROWS = {
    label: [
        row(label, name, decoding, index, prompt)
        for name, prompts in (("unseen", UNSEEN), ("normal", NORMAL))
        for decoding in PROTOCOL.decodings
        for index, prompt in enumerate(prompts)
    ]
    for label in SAID
}


def test_distances_by_hand(compared, tokenizer, tmp_path):
    models, loads = compared()
    models = [models[1], models[0], models[2]]
    figures = oracle_figures(models, ROWS, PROTOCOL, tmp_path)
    value = {(f["model"], f["set"], f["decoding"], f["metric"]): f["value"] for f in figures}
    assert value["base", "normal", None, "oracle_divergence"] == pytest.approx(0, abs=1e-6)  # it is the same model
    (question,) = ReleasedTemplate(tokenizer).prompts([NORMAL[0].question])
    answer = tokenizer(" Sorry, not now.", add_special_tokens=False).input_ids
    with torch.no_grad():
        oracle, own = (
            model.load()[0](input_ids=torch.tensor([question + answer])).logits[0].double().log_softmax(-1)
            for model in (models[2], models[1])
        )
    kl = (oracle.exp() * (oracle - own)).sum(-1)[len(question) - 1 : -1]
    found = value["sku", "normal", None, "oracle_divergence"]
    assert found == pytest.approx(kl.mean().item(), rel=1e-3) and found > 1e-3
    for decoding in ("greedy", "sampled"):
        assert (
            value["sku", "unseen", decoding, "oracle_kind"] == 0
            and value["base", "unseen", decoding, "oracle_kind"] == 1
        )
        assert value["base", "normal", decoding, "oracle_rouge"] == pytest.approx(2 * 2 / 5)
    assert {label for label, *_ in value} == {"base", "sku"}
    done = len(loads)
    assert oracle_figures(models, ROWS, PROTOCOL, tmp_path) == figures and len(loads) == done
    changed = [replace(models[0], identity={"label": "another"}), *models[1:]]
    oracle_figures(changed, ROWS, replace(PROTOCOL, decodings=[Decoding()]), tmp_path)
    assert len(loads) == done + 2  # only the changed model's


def test_an_oracle_with_another_vocabulary_is_refused(compared, tmp_path):
    models, _ = compared()

    other = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict))
    other_model = replace(models[0], load=lambda: (None, other))
    with pytest.raises(UserError, match="another vocabulary"):
        oracle_figures([models[1], other_model, models[2]], ROWS, PROTOCOL, tmp_path)


def test_answers_that_no_judge_could_read_are_of_no_kind(compared, tmp_path):
    models, _ = compared()
    unknown = {label: [dict(row) for row in rows] for label, rows in ROWS.items()}
    for row in unknown["base"]:
        row["verdict"] = "unjudged"
    unknown[ORACLE][0]["refused"] = None
    figures = oracle_figures([models[1], models[0], models[2]], unknown, PROTOCOL, tmp_path)
    kinds = [row for row in figures if row["metric"] == "oracle_kind" and row["set"] == "unseen"]
    n = {(row["model"], row["decoding"]): (row["value"], row["n"]) for row in kinds}
    assert n["base", "greedy"] == (None, 0) and n["sku", "greedy"] == (0, len(UNSEEN) - 1)
