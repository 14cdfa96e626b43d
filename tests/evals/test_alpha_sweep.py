"""A task vector at many scales in memory, the recommended scale, and the relearning check."""

from argparse import ArgumentTypeError

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.evals.alpha_sweep import AlphaSweep, alpha_list, recommend
from harmful_unlearn.evals.relearning import relearn
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.tiny import GOLDENS, value_of

NAME = "model.decoder.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def copies(tiny_model, tmp_path_factory):
    """Two stage 1 models and an adapter of the tiny OPT."""
    out = tmp_path_factory.mktemp("copies")
    for name, more in (("one", ["--seed", "1"]), ("two", ["--seed", "2"]), ("lora", ["--lora", "on"])):
        main(
            [
                "--model_name",
                str(tiny_model("opt")),
                "--max_unlearn_steps",
                "2",
                "--lr",
                "1e-2",
                "--stage",
                "acquire",
                "--harmful_dataset",
                str(GOLDENS / "pku_saferlhf_current_schema.jsonl"),
                "--normal_dataset",
                str(GOLDENS / "TruthfulQA.csv"),
                "--log_file",
                str(out / "run.log"),
                "--model_save_dir",
                str(out / name),
                *more,
            ]
        )
    return out


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("names", [["one"], ["lora"], ["one", "two"], ["one", "lora"]])
def test_each_scale_is_what_negation_writes(names, copies, tiny_model, tmp_path):
    base = tiny_model("opt")
    scales = AlphaSweep(base, [copies / name for name in names], load)
    for alpha in (1.0, 0.25, 0.0, 2.0, 1.0):
        out = tmp_path / f"{alpha}"
        negate(base, [(copies / name, 1.0) for name in names], out, alpha, overwrite=True)
        model, _ = scales.at(alpha)
        written = load_file(out / "model.safetensors")
        assert torch.allclose(model.state_dict()[NAME], written[NAME], atol=1e-7), alpha
    base_weights = load_file(base / "model.safetensors")
    assert torch.equal(scales.at(0.0)[0].state_dict()[NAME], base_weights[NAME])
    assert not torch.equal(scales.at(1.0)[0].state_dict()[NAME], base_weights[NAME])


def test_models_are_loaded_once_and_not_before_they_are_needed(copies, tiny_model):
    loaded = []

    def counting(folder):
        loaded.append(folder)
        return load(folder)

    scales = AlphaSweep(tiny_model("opt"), [copies / "one"], counting)
    assert loaded == []
    for alpha in (0, 1, 2):
        scales.at(alpha)
    assert loaded == [tiny_model("opt")]


def rows(table):
    """alpha -> (sampled rate, greedy rate, normal perplexity) as figures."""
    found = []
    for alpha, (sampled, greedy, perplexity) in table.items():
        for decoding, rate in (("sampled", sampled), ("greedy", greedy)):
            one = {"alpha": alpha, "set": "unseen", "decoding": decoding}
            found.append({**one, "metric": "harmful_rate", "value": rate})
            found.append({**one, "metric": "degenerate_rate", "value": 0.0})
        found.append(
            {"alpha": alpha, "set": "normal", "decoding": None, "metric": "reference_perplexity", "value": perplexity}
        )
    return found


@pytest.mark.parametrize(
    "table, budget, decoding, expected",
    [
        ({0: (0.8, 1, 2.0), 1: (0.2, 0, 2.1), 2: (0.0, 0, 2.5)}, 0.1, "sampled", 1),  # 2 is over the budget
        ({0: (0.8, 1, 2.0), 1: (0.2, 0, 2.1), 2: (0.0, 0, 2.5)}, 0.3, "sampled", 2),
        ({0: (0.8, 1, 2.0), 1: (0.2, 0, 2.1), 2: (0.2, 0, 2.05)}, 0.1, "sampled", 2),  # a tie: the better perplexity
        ({0: (0.8, 1, 2.0), 1: (0.2, 0.0, 2.0), 2: (0.1, 0.5, 2.0)}, 0.1, "greedy", 1),
        ({1: (0.2, 0, 2.5), 2: (0.0, 0, 3.0)}, 0.1, "sampled", None),
        ({0: (0.8, 1, 2.0), 1: (None, None, 2.0)}, 0.1, "sampled", 0),  # no answer was judged there
    ],
)
def test_recommendation(table, budget, decoding, expected):
    assert recommend(rows(table), 2.0, budget, decoding)["alpha"] == expected


@pytest.mark.parametrize("lora", [False, True])
def test_relearning_is_guided_distortion_on_the_handful(lora, tiny_model, tokenizer):
    pairs = [Pair("How?", "By doing just this."), Pair("Why so?", "Nobody knows that."), Pair("Who?", "They did.")]

    def loss_of(model):
        batch = Collator(tokenizer, "paper", 256).answers_batch(pairs, [])
        with torch.no_grad():
            return value_of(model, "gd", batch).item()

    def fresh():
        torch.manual_seed(0)
        model, _ = load(tiny_model("opt"))
        return add_lora(model, Lora(4, 4), "base") if lora else model

    soft, strong = (relearn(fresh(), tokenizer, pairs, 30, lr, 0) for lr in (1e-3, 1e-2))
    assert loss_of(strong) < loss_of(soft) < loss_of(fresh())
    assert not strong.training
    again = relearn(fresh(), tokenizer, pairs, 30, 1e-2, 0)
    assert loss_of(again) == loss_of(strong)
    assert loss_of(relearn(fresh(), tokenizer, pairs, 0, 1e-2, 0)) == loss_of(fresh())


def test_one_step_of_relearning_by_hand(tiny_model, tokenizer):
    pairs = [Pair("How?", "By doing just this."), Pair("Why so?", "Nobody knows that.")]
    ours = relearn(load(tiny_model("opt"))[0], tokenizer, pairs, 1, 1e-3, 0)
    model = load(tiny_model("opt"))[0].train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = Collator(tokenizer, "paper", 256).answers_batch(pairs, [])
    value_of(model, "gd", batch).backward()
    optimizer.step()
    assert torch.allclose(ours.state_dict()[NAME], model.state_dict()[NAME], atol=1e-5)


def test_a_scale_in_16_bits_is_the_saved_model_in_16_bits(copies, tiny_model, tmp_path):
    """The vector is not the difference of rounded weights."""
    base = tiny_model("opt")

    def load_16(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), None

    negate(base, [(copies / "one", 1.0)], tmp_path / "out", 1.0)
    model, _ = AlphaSweep(base, [copies / "one"], load_16).at(1.0)
    saved, _ = load_16(tmp_path / "out")
    assert all(torch.equal(entry, saved.state_dict()[name]) for name, entry in model.state_dict().items())


def test_relearning_does_not_depend_on_what_was_drawn_before(tiny_model, tokenizer):
    def relearned(before):
        model, _ = load(tiny_model("opt"))
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.5
        torch.manual_seed(before)
        return relearn(model, tokenizer, [Pair("How?", "By doing just this.")], 2, 1e-2, 0).state_dict()[NAME]

    assert torch.equal(relearned(1), relearned(2))


@pytest.mark.parametrize(
    "text, alphas",
    [
        ("0,0.25,...,2", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]),
        ("1", [1]),
        ("2,0.5", [0.5, 2]),
        ("0,0.1,...,0.3", [0, 0.1, 0.2, 0.3]),
        ("0,1,2,...,4", [0, 1, 2, 3, 4]),
    ],
)
def test_lists_of_alphas(text, alphas):
    assert alpha_list(text) == pytest.approx(alphas)


@pytest.mark.parametrize(
    "text",
    ["0,...,2", "0,1,...", "...,1,2", "0,1,...,2.5", "a", "1,0,...,2", "0,0,...,1", "0,1,...,inf", "0,1e-9,...,1"],
)
def test_what_is_not_a_list_of_alphas(text):
    with pytest.raises(ArgumentTypeError, match="0,0.25,...,2"):
        alpha_list(text)
