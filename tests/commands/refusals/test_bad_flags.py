"""Flags that are wrong: one line that names the fix, exit code 2, no traceback, and nothing written."""

import importlib.util
import json
from types import SimpleNamespace

import pytest

from tests.helpers.inputs.bad_input import TO, Bad, run_good

HARNESS = importlib.util.find_spec("lm_eval") is not None

TABLE = {
    "an unknown flag": Bad("unlearn", "--no_such_flag", "--help"),
    "a flag misspelt": Bad("unlearn", "--batch-size 2", "did you mean --batch_size?"),
    "a required flag misspelt": Bad("evaluate", "--modle x", "did you mean --model?"),
    "a flag abbreviated": Bad("unlearn", "--max_unlearn 3", "--max_unlearn_steps"),
    "a flag abbreviated, elsewhere": Bad("fetch", "--time 3", "--timeout"),
    "one dash": Bad("unlearn", "-lr 1e-3", "--lr"),
    "a stray word": Bad("demo", "quick", "--help"),
    "no value": Bad("unlearn", "--lr", "--help"),
    "no values": Bad("reproduce", "--seeds", "--help"),
    "too few values": Bad("reproduce", "--relearn_lr", "--help"),
    "a required flag left out": Bad("vector", "--output {out}/model", "--finetuned"),
    "text for a number": Bad("unlearn", "--lr fast", "a number above 0"),
    "text for a whole number": Bad("unlearn", "--batch_size 2.5", "a whole number from 1"),
    "zero": Bad("unlearn", "--lr 0", "a number above 0"),
    "NaN": Bad("unlearn", "--bad_weight nan", "a finite number"),
    "infinity": Bad("unlearn", "--bad_weight -inf", "a finite number"),
    "a negative rate in exponent form": Bad("unlearn", "--lr -1e-3", "a number above 0"),
    "a negative seed": Bad("answers", "--seed -1", "a whole number from 0"),
    "a seed too large": Bad("unlearn", "--seed 4294967296", "4294967295"),
    "no tokens": Bad("answers", "--max_length 0", "a whole number from 1"),
    "a temperature of 0": Bad("answers", "--temperature 0", "a number from 0.01"),
    "alpha is NaN": Bad("vector", TO + " --scaling_coef nan", "a finite number"),
    "a coefficient is infinite": Bad("vector", TO + " --coefs inf", "a finite number"),
    "a timeout below 0": Bad("fetch", "--timeout -1", "a number above 0"),
    "no seeds": Bad("demo", "--seeds 0", "from 1"),
    "a share above 1": Bad("demo", "--refusal_share 1.5", "from 0 to 1"),
    "an unknown choice": Bad("unlearn", "--variant both", "paper"),
    "an unknown device map": Bad("unlearn", "--device_map everywhere", "balanced"),
    "an unknown decoding": Bad("evaluate", "--decoding beam", "greedy"),
    "an unknown judge": Bad("evaluate", "--judge oracle", "classifier"),
    "no key for a judge": Bad("evaluate", "--judge openai:x", "OPENAI_API_KEY"),
    "no key for a judge, before any training": Bad("reproduce", "--judge openai:x", "OPENAI_API_KEY"),
    "no such judge model": Bad("reproduce", "--judge hf:{here}/none", "check the path"),
    "no such BLEURT": Bad("evaluate", "--bleurt {here}/none", "check the path"),
    "no harness": Bad("evaluate", "--lm_eval truthfulqa_mc1", "pip install lm_eval", skip=HARNESS),
    "no such GPU": Bad("answers", "--device_map cuda:99", "give auto or cpu"),
    "answers longer than the model": Bad("evaluate", "--max_new_tokens 9999", "--max_new_tokens of at most"),
    "answers longer than the model, shown": Bad("answers", "--max_length 9999", "--max_length of at most"),
    "prompts longer than the answers": Bad("answers", "--max_length 4", "--max_length above"),
    "texts of one token": Bad("unlearn", "--max_length 1", "give a larger one"),
    "a model's name too long for a file": Bad("evaluate", "--model " + 101 * "x" + "={tuned}", "NAME=PATH_OR_ID"),
    "4 bits without an adapter": Bad("unlearn", "--quantize 4bit --lora off", "--lora on"),
    "an unknown recipe": Bad("reproduce", "--recipe gpt", "recipes.py"),
    "an unknown run": Bad("reproduce", "--runs kto", "task_vector"),
    "an unknown category": Bad("unlearn", ["--harm_category", "No Such Harm"], "take from"),
    "an unknown category, before any training": Bad("reproduce", ["--harm_category", "No Such Harm"], "take from"),
    "scales that reach no end": Bad("reproduce", "--alpha_sweep 0,1,...,inf", "0,0.25,...,2"),
    "a billion scales": Bad("reproduce", "--alpha_sweep 0,1e-9,...,1", "0,0.25,...,2"),
    "an open quote": Bad("reproduce", ["--train_flags", "'"], "--help"),
    "a training flag misspelt": Bad("reproduce", ["--train_flags", "--prescision bf16"], "--precision"),
    "nothing to learn": Bad("unlearn", "--bad_weight 0 --random_weight 0 --normal_weight 0", "weights are all 0"),
    "nothing to measure": Bad("evaluate", "--n_seen 0", "--n_seen"),
    "two of a kind": Bad("vector", TO + " --vector {tuned}", "--finetuned"),
    "nothing to write": Bad("vector", "--finetuned {tuned}", "--output"),
    "a scale twice": Bad("vector", TO + " --scaling_coef 1 1.0", "once"),
    "coefficients without models": Bad("vector", TO + " --coefs 1 2", "one each"),
    "a model's name twice": Bad("evaluate", "--model m={base}", "NAME=PATH_OR_ID"),
    "a stage against a model": Bad("unlearn", "--stage acquire --saved_model {tuned}", "--stage acquire"),
    "a weight the method lacks": Bad("unlearn", "--method ga --normal_weight 1", "leave it out"),
    "LoRA's rank without LoRA": Bad("unlearn", "--lora off --lora_r 4", "--lora on"),
    "an unknown LoRA target": Bad("unlearn", "--lora on --lora_target_modules query", "q_proj"),
    "more answers than there are": Bad("unlearn", "--k_random 99", "at most"),
    "a name that is no text": Bad("vector", [*TO.split()[:-1], "{out}/\udcff"], "UTF-8"),
    "an empty path": Bad("vector", ["--finetuned", "{tuned}", "--output", ""], "empty"),
    "an empty model": Bad("unlearn", ["--model_name", ""], "empty"),
    "an empty data set": Bad("unlearn", ["--harmful_dataset", ""], "empty"),
    "lines in a name": Bad("vector", ["--finetuned", "./a\nb\x1b[31m", "--output", "{out}/m"], "check the path"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name, is_refused):
    is_refused(TABLE[name])


@pytest.mark.parametrize("name", ["one dash", "a flag abbreviated, elsewhere"])
def test_bad_input_to_a_script(name, is_refused_as_a_script):
    """A few of the same, as processes of their own."""
    is_refused_as_a_script(TABLE[name])


def test_negative_numbers_may_have_an_exponent(models, tmp_path):
    """argparse by itself takes -1e-3 for a flag."""
    at = SimpleNamespace(**vars(models), out=tmp_path)
    words = "--finetuned {tuned} --coefs -1E+0 --output {out}/model --scaling_coef -1e-3 -.5e1"
    assert run_good("vector", words, at) == 0
    scales = {json.loads(file.read_text())["scaling_coef"] for file in tmp_path.glob("model/*/run.json")}
    assert scales == {-1e-3, -5.0}
    assert run_good("unlearn", "--bad_weight -1e-3 --normal_weight -1.5e+0 --scaling_coef -2e0 --check", at) == 0
