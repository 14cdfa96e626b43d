"""The methods of after 2023 against their papers' formulas, text by text: values and gradients."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.prompt_format import PROMPT_TEMPLATE, Pair
from harmful_unlearn.data.step_batches import StepBatches, run_sampler
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.losses import objective
from harmful_unlearn.losses.methods import active_losses
from harmful_unlearn.losses.terms import LossParameters, reads
from harmful_unlearn.models.blocks import mlp_outputs, steered_layer, trained_blocks
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.models.tree_attention import TREE
from harmful_unlearn.training.flags import parse_flags
from tests.helpers.inputs.tables import TODAY, TRUTHFUL

LATER = ["grad_diff", "npo", "simnpo", "refusal_sft", "dpo", "safe_unlearning", "rmu"]
CPU = torch.device("cpu")
STEP = 1


class Plain:
    """A model and its base, asked for one text at a time."""

    def __init__(self, model, base, tokenizer, parameters: LossParameters):
        self.model, self.base, self.tokenizer, self.parameters = model, base, tokenizer, parameters

    def read(self, model, question: str, answer: str):
        """Log-probabilities of the answer's tokens, [tokens], those tokens' places, and the layer's hidden states."""
        ids = self.tokenizer(PROMPT_TEMPLATE.format(question=question, answer=answer)).input_ids
        prompt = self.tokenizer(PROMPT_TEMPLATE.format(question=question, answer="").rstrip()).input_ids
        start = next(
            (place for place, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), len(prompt)
        )
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        places = torch.arange(start, len(ids))
        log_p = output.logits[0].log_softmax(-1)[places - 1, torch.tensor(ids)[places]]
        layer = steered_layer(model.config, self.parameters.rmu_layer)
        return log_p, places, output.hidden_states[layer][0]

    def log_p(self, pair) -> torch.Tensor:
        return self.read(self.model, *pair)[0]

    def of_base(self, pair) -> torch.Tensor:
        with torch.no_grad(), self.base.active() as base:
            return self.read(base, *pair)[0]

    def ratio(self, pair) -> torch.Tensor:
        """r, token by token."""
        return self.log_p(pair) - self.of_base(pair)

    def term(self, name: str, harmful: list, safe: list, normal: list) -> torch.Tensor:
        """A term by its formula. The arguments are (question, answer)."""
        beta, gamma = self.parameters.beta, self.parameters.gamma
        if name in ("ga", "ft", "sft"):
            texts = {"ga": harmful, "ft": normal, "sft": safe}[name]
            entropies = torch.stack([-self.log_p(pair).mean() for pair in texts])
            return -entropies.mean() if name == "ga" else entropies.mean()
        if name == "npo":
            each = [-2 / beta * F.logsigmoid(-beta * self.ratio(pair).sum()) for pair in harmful]
        elif name == "simnpo":
            each = [-2 / beta * F.logsigmoid(-beta * self.log_p(pair).mean() - gamma) for pair in harmful]
        elif name == "su":
            each = [-F.logsigmoid(-beta * self.ratio(pair).mean()) for pair in harmful]
        elif name == "dpo":
            margins = [self.ratio(good).sum() - self.ratio(bad).sum() for good, bad in zip(safe, harmful, strict=True)]
            each = [-F.logsigmoid(beta * margin) for margin in margins]
        elif name == "rmu":
            direction = torch.rand(32, generator=torch.Generator().manual_seed(self.parameters.seed))
            goal = self.parameters.rmu_coef * direction / direction.norm()
            each = []
            for pair in harmful:
                _, places, states = self.read(self.model, *pair)
                each.append(F.mse_loss(states[places - 1], goal.expand(len(places), -1)))
        elif name == "rmk":
            distances = []
            for pair in normal:
                states = self.read(self.model, *pair)[2]
                with torch.no_grad(), self.base.active() as base:
                    goal = self.read(base, *pair)[2]
                distances.append((states - goal).square().mean(-1))
            return torch.cat(distances).mean()
        return torch.stack(each).mean()


@pytest.fixture(scope="module")
def data():
    return {"harmful": read_harmful(str(TODAY)), "normal": read_normal(TRUTHFUL, 0)}


def world(method, architecture, lora, data, tiny_model, tokenizer, **changes):
    """The flags, a model some way from its base, both as `Plain`, and the step's batches."""
    settings = parse_flags(["--method", method, "--batch_size", "4", "--k_random", "2"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    base = ReferenceModel(AutoModelForCausalLM.from_pretrained(tiny_model(architecture)))
    blocks = trained_blocks(steered_layer(model.config, settings.rmu_layer)) if method == "rmu" else None
    if lora:
        model = add_lora(model, Lora(4, 4), "base", blocks)
        base = ReferenceModel(model)
    elif blocks:
        model.requires_grad_(False)
        for weight in mlp_outputs(model, blocks):
            weight.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += (0.3 if "lora_B" in name else 0.02) * torch.randn_like(parameter)
    parameters = replace(settings.loss_parameters, gamma=0.3 if method == "simnpo" else 0.0)
    needed = reads(active_losses(vars(settings)))
    for one in (model, base.model):
        one.set_attn_implementation(TREE if changes["packed_up_to"] else "sdpa")
    sampler = run_sampler(vars(settings), 1, data["harmful"], data["normal"], needed)
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    batches = StepBatches(collator, sampler, **data, reads=needed, **changes)
    return settings, model, base, parameters, batches


def values_and_gradient(model, compute):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = None
    values: dict[str, float] = {}
    for loss, each in compute():
        loss.backward()
        for name, value in each.items():
            values[name] = values.get(name, 0.0) + value.item()
    return values, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]


@pytest.mark.parametrize("method", LATER)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "way",
    [
        "packed",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("the model's own head", "two processes")),
        pytest.param("plain rows, small passes", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_the_papers_formula(method, lora, way, data, tiny_model, tokenizer, monkeypatch):
    architecture = "opt" if way == "plain rows, small passes" else "llama"
    limits = {"packed_up_to": 0 if "plain" in way else math.inf}
    limits |= {"tokens_per_pass": 60} if "small" in way else {}
    settings, model, base, parameters, batches = world(
        method, architecture, lora, data, tiny_model, tokenizer, **limits
    )
    if "own head" in way:
        monkeypatch.setattr(objective, "has_plain_head", lambda _: False)
    ours = objective.Objective(model, settings.loss_weights, base, parameters)
    shares = [(0, 2), (1, 2)] if way == "two processes" else [(0, 1)]
    passes = [part for share in shares for part in replace(batches, share=share)(STEP, CPU)]
    assert len(passes) > 1 or "small" not in way

    indices = batches.sampler[STEP]
    rows = indices.harmful_rows
    harmful, safe = data["harmful"], [row for row in rows if data["harmful"].safe_answers[row]]
    if batches.reads.only_with_safe:
        assert safe == rows and len(rows) > 1
    plain = Plain(model, base, tokenizer, parameters)
    texts = (
        [(harmful.pairs[row].question, harmful.pairs[row].answer) for row in rows],
        [(harmful.pairs[row].question, harmful.safe_answers[row]) for row in safe],
        [(text.question, text.answer) for text in (data["normal"].texts[row] for row in indices.normal_rows)],
    )

    def by_formula():
        each = {name: plain.term(name, *texts) for name, weight in settings.loss_weights.items() if weight}
        yield sum(settings.loss_weights[name] * value for name, value in each.items()), each

    expected, gradients = values_and_gradient(model, by_formula)
    found, ours_gradients = values_and_gradient(model, lambda: (ours(model, part) for part in passes))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    largest = max(gradient.abs().max() for gradient in gradients)
    assert largest > 1e-6
    for one, other in zip(ours_gradients, gradients, strict=True):
        assert (one - other).abs().max() < 3e-4 * largest


@pytest.mark.slow
def test_dpo_is_trls(data, tiny_model, tokenizer, tmp_path):
    """Value and gradient of trl's trainer on the same tokens; the other methods are not in trl."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    settings, model, base, parameters, batches = world(
        "dpo", "llama", False, data, tiny_model, tokenizer, packed_up_to=math.inf
    )
    (batch,) = batches(STEP, CPU)
    ours = objective.Objective(model, settings.loss_weights, base, parameters)
    found, gradients = values_and_gradient(model, lambda: [ours(model, batch)])
    for one in (model, base.model):
        one.set_attn_implementation("sdpa")
    arguments = trl.DPOConfig(
        str(tmp_path),
        beta=parameters.beta,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = trl.DPOTrainer(model, base.model, arguments, train_dataset=rows, processing_class=tokenizer)
    examples = []
    for row in batches.sampler[STEP].harmful_rows:
        pair = data["harmful"].pairs[row]
        texts = batches.collator.encode([Pair(pair.question, data["harmful"].safe_answers[row]), pair])
        start = texts[0].answer_start
        assert texts[1].answer_start == start
        examples.append(
            {
                "prompt_ids": texts[0].input_ids[:start],
                "chosen_ids": texts[0].input_ids[start:],
                "rejected_ids": texts[1].input_ids[start:],
            }
        )
    inputs = DataCollatorForPreference(pad_token_id=1)(examples)

    def by_trl():
        loss = trainer.compute_loss(model, inputs)
        yield loss, {"dpo": loss}

    expected, theirs = values_and_gradient(model, by_trl)
    assert found["dpo"] == pytest.approx(expected["dpo"], rel=1e-5)
    largest = max(gradient.abs().max() for gradient in theirs)
    for one, other in zip(gradients, theirs, strict=True):
        assert (one - other).abs().max() < 3e-4 * largest
