"""Flags from a file: what it says is what the command line would say, and what is printed says the same again."""

import shlex

import pytest

import main as spot_check
import task_vector
from harmful_unlearn import demo, evaluation
from harmful_unlearn.cli import FlagParser
from harmful_unlearn.comparison import settings as comparison
from harmful_unlearn.losses.methods import METHODS
from harmful_unlearn.storage.files import user_path
from harmful_unlearn.training import flags as training

COMMANDS = {
    "training": (
        training.parse_flags,
        "--method lands --lr 2e-4 --bad_weight -1e-3 --random_weight 0 --harm_category 'a' --harm_category b,c "
        "--resume --lora on --lora_target_modules q_proj v_proj --system_prompt= --overwrite --model_name on "
        "--log_file null",
    ),
    "resumed": (training.parse_flags, "--resume some/checkpoint --no_packing --seed 0 --max_kl 0 --precision bf16"),
    "evaluation": (
        evaluation.parse_flags,
        "--base b --model x=u --model other/y --output o --n_seen 0 --base_answers none --decoding greedy sampled "
        "--bleurt --lm_eval a b --top_k 0 --prefill 'Yes: no' true",
    ),
    "comparison": (
        comparison.parse_flags,
        "--model_name m --recipe demo --output o/{seed} --seeds 1 0 --alpha_sweep 0,0.1,...,1 --search 3 "
        "--train_flags=\"--precision fp32 --system_prompt 'a b'\" --runs sku npo --search_budget 1e-3",
    ),
    "demo": (demo.parse_flags, "--quick --refusal_share 0 --seeds 2"),
    "spot check": (spot_check.parse_flags, "--greedy --harmful_prompt 'How: # so' --harmful_prompt - --seed 0"),
}


def printed(parse, words, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse([*words, "--write_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_written_says_the_same_again(command, tmp_path, capsys):
    parse, text = COMMANDS[command]
    words, file = shlex.split(text), tmp_path / "run.yaml"
    file.write_text(printed(parse, words, capsys))
    assert parse(["--config", str(file)]) == parse(words)
    assert printed(parse, [f"--config={file}"], capsys) == file.read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_defaults_can_be_given_again(method, tmp_path, capsys):
    (file := tmp_path / "run.yaml").write_text(printed(training.parse_flags, ["--method", method], capsys))
    assert training.parse_flags(["--config", str(file)]) == training.parse_flags(["--method", method])


def test_negation_has_it_too(tmp_path, capsys):
    words = shlex.split("--base b --finetuned f g --coefs 1 -0.5 --output o --scaling_coef 0.5 2 --force")
    (file := tmp_path / "run.yaml").write_text(printed(task_vector.main, words, capsys))
    assert printed(task_vector.main, ["--config", str(file)], capsys) == file.read_text()


@pytest.fixture
def read(tmp_path):
    """Reads a file with this text, and flags from the command line."""

    def parsed(text: str, *words: str):
        (tmp_path / "run.yaml").write_text(text)
        return training.parse_flags(["--config", str(tmp_path / "run.yaml"), *words])

    return parsed


def test_the_command_line_comes_before_the_file(read):
    text = (
        "lr: 2e-4\nharm_category: [a, b]\noverwrite: yes\nall_harmful: true\nseed: 3\nmax_length:\nsystem_prompt: null"
    )
    settings = read(text, "--harm_category", "c", "--no_overwrite", "--seed=4")
    assert (settings.lr, settings.harm_category, settings.seed) == (2e-4, ["c"], 4)
    assert settings.all_harmful and not settings.overwrite
    assert settings.max_length is None and settings.system_prompt is None


def test_a_value_is_text_as_it_is_written(read):
    assert read("lora: on").lora == "on" and read("lora: off").lora == "off"
    assert read("model_name: 1.10").model_name == "1.10" and read('system_prompt: ""').system_prompt == ""
    assert read("resume: true").resume == "auto" and read("resume: no").resume is None
    assert read("resume: a/b").resume == user_path("a/b")
    assert read("harm_category: one").harm_category == ["one"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: 1", "unknown flag learning_rate"),
        ("batchsize: 1", "did you mean --batch_size?"),
        ("batch-size: 1", "did you mean --batch_size?"),
        ("no_overwrite: true", "unknown flag no_overwrite"),
        ("config: x.yaml", "unknown flag config"),
        ("lr: 1\nlr: 2", "line 2 of"),
        ("lr: [1, 2]", "--lr takes one value"),
        ("lr: {a: 1}", "no single value"),
        ("overwrite: 2", "write true or false"),
        ("- lr", "no list of flags"),
        ("# lr: 1", "has no flags in it"),
        ("lr: [", "is not YAML"),
        ("lr: fast", "--lr: give a number above 0"),
        ("model_name: hf_abcdefghijklmnopqrstuvwxyz", "set it in the environment"),
    ],
)
def test_a_wrong_file_is_one_line_that_says_what_to_mend(text, message, read, capsys):
    with pytest.raises(SystemExit) as stop:
        read(text)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["--config"], ["--config", ""], ["--config", "none.yaml"], ["--config", "."]])
def test_a_file_that_cannot_be_read_is_an_error(words, capsys):
    with pytest.raises(SystemExit) as stop:
        training.parse_flags(words)
    assert stop.value.code == 2 and "--config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word", ["hf_" + "a" * 34, "sk-proj-" + "a1" * 20, "ghp_" + "a" * 36, "https://me:" + "secret@example.org/x.csv"]
)
def test_a_secret_is_refused_and_not_shown(word, capsys):
    with pytest.raises(SystemExit) as stop:
        training.parse_flags(["--harmful_dataset", word])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "error: --harmful_dataset looks like" in error and word not in error


def test_without_settings_there_is_no_such_flag(capsys):
    with pytest.raises(SystemExit):
        FlagParser().parse_args(["--config", "x"])
    assert "unknown argument --config" in capsys.readouterr().err
