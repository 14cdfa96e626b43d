"""Flags from a file: what it says is what the command line would say, and what is printed says the same again."""

import shlex

import pytest

import main as spot_check
import task_vector
from harmful_unlearn import demo, evaluation
from harmful_unlearn.cli.flag_parser import FlagParser
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


def test_what_follows_from_a_flag_follows_from_its_new_value(tmp_path, capsys):
    """In the file it is a comment, so that two runs are never mixed."""
    words = ["--method", "lands", "--model_name", "base"]
    (file := tmp_path / "run.yaml").write_text(text := printed(training.parse_flags, words, capsys))
    assert "# lr: 0.0001\n" in text and "\nseed: 8888\n" in text
    other = ["--method", "sku", "--model_name", "other"]
    assert training.parse_flags(["--config", str(file), *other]) == training.parse_flags(other)
    file.write_text(printed(spot_check.parse_flags, [], capsys))
    assert spot_check.parse_flags(["--config", str(file), "--chat"]) == spot_check.parse_flags(["--chat"])


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


def test_every_flag_of_a_file_can_be_left_out_again(read):
    text = "resume: true\nlr: 1\nseed: 3\nharm_category: [a]\nsystem_prompt: x\nno_packing: yes\nmodel_save_dir: m"
    names = [line.partition(":")[0] for line in text.splitlines()]
    assert read(text, *(f"--no_{name}" for name in names)) == training.parse_flags([])
    assert {name for name in names if vars(read(text))[name] == vars(training.parse_flags([]))[name]} == set()


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
        ("lr: [", "is not YAML (line 1: "),
        ("seed: " + "[" * 3000, "is not YAML"),
        ("lr: fast", "--lr: give a number above 0, not 'fast', in "),
        ("model_name: hf_abcdefghijklmnopqrstuvwxyz", "set it in the environment"),
    ],
)
def test_a_wrong_file_is_one_line_that_says_what_to_mend(text, message, read, capsys):
    with pytest.raises(SystemExit) as stop:
        read(text)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_there_is_one_file(capsys):
    with pytest.raises(SystemExit):
        training.parse_flags(["--config", "a.yaml", "--config=b.yaml"])
    assert "--config is given twice: put all flags into one file" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--config"], ["--config", ""], ["--config", "none.yaml"], ["--config", "."]])
def test_a_file_that_cannot_be_read_is_an_error(words, capsys):
    with pytest.raises(SystemExit) as stop:
        training.parse_flags(words)
    assert stop.value.code == 2 and "--config" in capsys.readouterr().err


SECRETS = [
    "hf_" + "a" * 34, "my_hf_" + "aB3" * 11, "api_org_" + "a" * 34,
    "sk-proj-" + "a1" * 20, "sk-" + "aB3" * 16, "sk-ant-api03-" + "aB3_" * 3 + "aB3" * 24, "sk-or-v1-" + "0f" * 32,
    "ghp_" + "a" * 36, "wandb_v1_" + "aB3" * 12, "0f" * 20, "AIza" + "aB3-" * 9, "gsk_" + "aB3" * 16,
    "nvapi-" + "aB3-" * 12, "r8_" + "aB3" * 12, "pplx-" + "aB3" * 12, "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln",
    "Bearer " + "aB3." * 6, "-----BEGIN " + "PRIVATE KEY-----", "-----BEGIN RSA " + "PRIVATE KEY-----",
    "https://me:" + "secret@example.org/x.csv", "https://" + "aB3" * 9 + "@example.org/x.csv",
    "https://example.org/x?api_key=" + "abc", "https://example.org/x?a=b&token=" + "abc", "WANDB_API_KEY=" + "a1" * 20,
]  # fmt: skip


@pytest.mark.parametrize("word", SECRETS)
def test_a_secret_is_refused_and_not_shown(word, capsys):
    for words in (["--harmful_dataset", word], [f"--harmful_dataset={word}"]):
        with pytest.raises(SystemExit) as stop:
            training.parse_flags(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "error: --harmful_dataset looks like" in error and word not in error


@pytest.mark.parametrize(
    "words",
    [
        ["--harmful_revision", "ff7ba91063016c78a225b0f74e1c0860bb18230f"],
        ["--harmful_revision=ff7ba91063016c78a225b0f74e1c0860bb18230f"],
        ["--harmful_dataset", "sk-learn-classifier-for-harm.json"],
        ["--model_name", "models--facebook--opt-1.3b/snapshots/" + "0f" * 20],
        ["--system_prompt", "0f" * 32],
        [
            "--system_prompt",
            "Who's the bearer of responsibilities? Ask a risk-management-professional2, https://a/b?c=d@e",
        ],
        ["--model_name", "someone/my_hf_opt-converted-checkpoint"],
        ["--model_name", "desk-task-force/flask-application-for-tokens-2"],
    ],
)
def test_what_only_looks_a_little_like_a_secret_is_taken(words):
    training.parse_flags(words)


@pytest.mark.parametrize(
    "words",
    [
        ["--token=hf_short"], ["--seed", "hf_short"], ["--lora=hf_short"], ["hf_short"], ["--overwrite", "hf_short"],
        ["--config", "hf_short"], ["-----BEGIN " + "PRIVATE KEY-----hf_short"], ["hf_short" + "a" * 30 + "\udcff"],
    ],
)  # fmt: skip
def test_an_error_never_shows_what_may_be_a_secret(words, capsys):
    with pytest.raises(SystemExit):
        training.parse_flags(words)
    assert "short" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["overwrite: hf_short", "seed: [hf_short", "seed: hf_short", "hf_short: 1"])
def test_nor_does_an_error_about_a_file(text, read, capsys):
    with pytest.raises(SystemExit):
        read(text)
    assert "short" not in capsys.readouterr().err


def test_without_settings_there_is_no_such_flag(capsys):
    with pytest.raises(SystemExit):
        FlagParser().parse_args(["--config", "x"])
    assert "unknown argument --config" in capsys.readouterr().err
