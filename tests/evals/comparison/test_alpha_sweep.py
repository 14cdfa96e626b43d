"""A task vector at many values of alpha in memory, and the recommended one."""

from argparse import ArgumentTypeError

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmful_unlearn.evals.comparison.alpha_sweep import AlphaSweep, alpha_list, recommend
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.models.tiny import GOLDENS

NAME = "model.decoder.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A folder with two stage 1 models and an adapter of the tiny OPT: one, two, lora."""
    out = tmp_path_factory.mktemp("trained")
    data = f"--harmful_dataset {GOLDENS}/pku_saferlhf_current_schema.jsonl --normal_dataset {GOLDENS}/TruthfulQA.csv"
    flags = f"--model_name {tiny_model('opt')} --max_unlearn_steps 2 --lr 1e-2 --stage acquire {data}".split()
    for name, more in (("one", ["--seed", "1"]), ("two", ["--seed", "2"]), ("lora", ["--lora", "on"])):
        main([*flags, "--log_file", str(out / "run.log"), "--model_save_dir", str(out / name), *more])
    return out


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("names", [["one"], ["lora"], ["one", "two"], ["one", "lora"]])
def test_each_alpha_is_what_negation_writes(names, trained, tiny_model, tmp_path):
    base = tiny_model("opt")
    sweep = AlphaSweep(base, [trained / name for name in names], load)
    for alpha in (1.0, 0.25, 0.0, 2.0, 1.0):
        out = tmp_path / f"{alpha}"
        negate(base, [(trained / name, 1.0) for name in names], out, alpha, overwrite=True)
        model, _ = sweep.at(alpha)
        written = load_file(out / "model.safetensors")
        assert torch.allclose(model.state_dict()[NAME], written[NAME], atol=1e-7), alpha
    base_weights = load_file(base / "model.safetensors")
    assert torch.equal(sweep.at(0.0)[0].state_dict()[NAME], base_weights[NAME])
    assert not torch.equal(sweep.at(1.0)[0].state_dict()[NAME], base_weights[NAME])


def test_models_are_loaded_once_and_not_before_they_are_needed(trained, tiny_model):
    loaded = []

    def counting(folder):
        loaded.append(folder)
        return load(folder)

    sweep = AlphaSweep(tiny_model("opt"), [trained / "one"], counting)
    assert loaded == []
    for alpha in (0, 1, 2):
        sweep.at(alpha)
    assert loaded == [tiny_model("opt")]


def figures_of(table):
    """alpha -> (sampled rate, greedy rate, normal perplexity) as figures."""
    figures = []
    for alpha, (sampled, greedy, perplexity) in table.items():
        normal = {"alpha": alpha, "set": "normal", "decoding": None}
        figures.append({**normal, "metric": "reference_perplexity", "value": perplexity})
        for decoding, rate in (("sampled", sampled), ("greedy", greedy)):
            unseen = {"alpha": alpha, "set": "unseen", "decoding": decoding}
            figures.append({**unseen, "metric": "harmful_rate", "value": rate})
            figures.append({**unseen, "metric": "degenerate_rate", "value": 0.0})
    return figures


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
    assert recommend(figures_of(table), 2.0, budget, decoding)["alpha"] == expected


def test_an_alpha_in_16_bits_is_the_saved_model_in_16_bits(trained, tiny_model, tmp_path):
    """The vector is not the difference of rounded weights."""
    base = tiny_model("opt")

    def load_16(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), None

    negate(base, [(trained / "one", 1.0)], tmp_path / "out", 1.0)
    model, _ = AlphaSweep(base, [trained / "one"], load_16).at(1.0)
    saved, _ = load_16(tmp_path / "out")
    assert all(torch.equal(entry, saved.state_dict()[name]) for name, entry in model.state_dict().items())


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
