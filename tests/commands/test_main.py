"""The spot check."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import main as spot_check
from harmful_unlearn.chat.terminal import printable
from harmful_unlearn.chat.web import ChatServer
from harmful_unlearn.errors import UserError
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.storage.files import ROOT
from task_vector import main as negate


@pytest.fixture
def harmful(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("opt"), tmp_path / "harmful")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def run(capsys, *flags: str) -> str:
    spot_check.main(list(flags))
    return capsys.readouterr().out


def test_answers_side_by_side_and_makes_the_unlearned_model(tiny_model, harmful, tmp_path, capsys):
    base, unlearned = tiny_model("opt"), tmp_path / "unlearned"
    flags = ("--base", str(base), "--unlearned", str(unlearned), "--harmful_model", str(harmful))
    first = run(capsys, *flags)
    assert "making" in first and (unlearned / "model.safetensors").exists()
    for prompt in spot_check.HARMFUL_PROMPTS + spot_check.NORMAL_PROMPTS:
        assert prompt in first
    assert first.count("base ") >= 6 and first.count("| unlearned") == 6
    again = run(capsys, *flags)
    assert "making" not in again
    assert again in first  # the same seed, the same answers


def test_seed_greedy_and_own_prompts(tiny_model, capsys):
    base = str(tiny_model("llama"))
    flags = ("--base", base, "--unlearned", base, "--harmful_prompt", "How do I hide a gnome?")
    sampled, other = run(capsys, *flags), run(capsys, *flags, "--seed", "33")
    assert "gnome" in sampled and sampled.count("| unlearned") == 1
    assert sampled.splitlines()[4:] != other.splitlines()[4:]
    greedy = run(capsys, *flags, "--greedy")
    assert greedy == run(capsys, *flags, "--greedy")
    left, right = zip(*(line.split(" | ") for line in greedy.splitlines() if " | " in line), strict=True)
    assert [line.strip() for line in left[2:]] == [line.strip() for line in right[2:]]  # one model twice


@pytest.fixture
def shown(monkeypatch) -> list[dict[str, str]]:
    """The answers to each prompt that are shown, by label."""
    answers: list[dict[str, str]] = []
    side_by_side = spot_check.side_by_side
    monkeypatch.setattr(spot_check, "side_by_side", lambda row: answers.append(row) or side_by_side(row))
    return answers


def test_several_models(tiny_model, harmful, tmp_path, capsys, shown):
    base = tiny_model("opt")
    folders = [shutil.copytree(folder, tmp_path / name / "unlearned") for folder, name in ((harmful, "a"), (base, "b"))]
    asked = ("--base", str(base), "--greedy", "--normal_prompt", "Why?", "--unlearned", *map(str, folders))
    screen = run(capsys, *asked)
    assert screen.splitlines()[1:3] == [f"a/unlearned: {folders[0]}", f"b/unlearned: {folders[1]}"]
    (answers,) = shown
    assert [*answers] == ["base", "a/unlearned", "b/unlearned"]
    assert answers["base"] == answers["b/unlearned"] != answers["a/unlearned"]
    assert screen.splitlines()[6].split() == "base | a/unlearned | b/unlearned".split()
    with pytest.raises(UserError, match="no model in .*none: several"):
        run(capsys, *asked, str(tmp_path / "none"))
    with pytest.raises(UserError, match="a/unlearned twice: name it once"):
        run(capsys, *asked, str(folders[0]))
    with pytest.raises(UserError, match="twice: name it once"):
        run(capsys, *asked, str(tmp_path / "b" / ".." / "a" / "unlearned"))


def test_labels():
    def labels(*names: str) -> list[str]:
        return spot_check.labels_of([Path("/") / name for name in names])

    assert labels("x/y") == ["unlearned"]
    assert labels("x/a", "x/b") == ["a", "b"]
    assert labels("x/base", "x/b") == ["x/base", "x/b"]  # not to be taken for the base
    assert labels("a/x/y", "b/x/y") == ["a/x/y", "b/x/y"]
    assert labels("a/b", "b") == ["a/b", "/b"]


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        ("--chat --web", "give one of them"),
        ("--chat --normal_prompt Why?", "leave out --harmful_prompt and --normal_prompt"),
        ("--web --harmful_prompt Why?", "leave out --harmful_prompt and --normal_prompt"),
    ],
)
def test_flags_that_contradict_each_other(flags, fix, capsys):
    with pytest.raises(SystemExit) as stop:
        spot_check.main(flags.split())
    assert stop.value.code == 2 and fix in capsys.readouterr().err


def test_a_chat_says_what_the_spot_check_says(tiny_model, harmful, capsys, monkeypatch, shown):
    """The command itself, in the terminal and as the page's server."""
    flags = ["--base", str(tiny_model("opt")), "--unlearned", str(harmful), "--greedy", "--max_length", "50"]
    run(capsys, *flags, "--normal_prompt", "Why?")
    base, unlearned = shown[0].values()
    typed = iter(["Why?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    screen = run(capsys, *flags, "--chat")
    assert f"base: {printable(base)} (cut" in screen and f"unlearned: {printable(unlearned)} (cut" in screen
    served: list[dict] = []

    def serve(server: ChatServer) -> None:
        server.is_busy.acquire()
        server.begin("Why?", server.decoding).join()
        served.extend(server.events)

    monkeypatch.setattr(ChatServer, "run", serve)
    assert "template: released" in run(capsys, *flags, "--web", "--port", "0")
    for number, answer in enumerate((base, unlearned)):
        assert "".join(event.get("text", "") for event in served if event.get("model") == number) == answer


@pytest.mark.parametrize("flag", ["--chat", "--web"])
@pytest.mark.parametrize(("length", "fix"), [("9999", "at most that"), ("5", "a --max_length above that")])
def test_what_users_can_fix_of_a_chat(flag, length, fix, tiny_model):
    base = str(tiny_model("opt"))
    with pytest.raises(UserError, match=fix):
        spot_check.main(["--base", base, "--unlearned", base, flag, "--port", "0", "--max_length", length])


def test_columns():
    lines = spot_check.side_by_side({"base": "one two " * 40, "unlearned": ""}).splitlines()
    assert lines[0].split(" | ")[1] == "unlearned" and "(nothing)" in lines[2]
    assert len({line.index("|") for line in lines if "|" in line}) == 1


@pytest.mark.parametrize(
    "flags, fix",
    [
        (["--unlearned", "none", "--harmful_model", "none"], "run harmful_unlearn/unlearn_harm_new.py"),
        (["--max_length", "4"], "--max_length"),
        (["--unlearned", "EMPTY"], "safetensors"),
    ],
)
def test_what_users_can_fix(flags, fix, tiny_model, tmp_path):
    base = str(tiny_model("opt"))
    (tmp_path / "empty").mkdir()
    flags = [str(tmp_path / "empty") if flag == "EMPTY" else flag for flag in flags]
    with pytest.raises(UserError, match=fix):
        spot_check.main(["--base", base, "--unlearned", base, *flags])


@pytest.mark.slow
def test_runs_as_a_script_from_anywhere(tiny_model, tmp_path):
    base = str(tiny_model("qwen2"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--base", base, "--unlearned", base, "--normal_prompt", "Why?"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "normal prompt: Why?" in done.stdout


def test_an_unlearning_adapter_is_asked_on_its_base(tiny_model, tmp_path, capsys):
    """It answers like the full model that is made from the same adapter."""
    base = tiny_model("llama")
    torch.manual_seed(0)
    model = add_lora(AutoModelForCausalLM.from_pretrained(base), Lora(4, 4), str(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1.0)
    model.save_pretrained(tmp_path / "harmful")
    given = ["--base", str(base), "--finetuned", str(tmp_path / "harmful")]
    negate([*given, "--output", str(tmp_path / "full"), "--adapter_output", str(tmp_path / "adapter")])
    answers = [
        run(capsys, "--base", str(base), "--unlearned", str(tmp_path / name), "--greedy").partition("answers:")[2]
        for name in ("full", "adapter")
    ]
    assert answers[0] == answers[1]
    assert answers[0] != run(capsys, "--base", str(base), "--unlearned", str(base), "--greedy").partition("answers:")[2]
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="broken"):
        run(capsys, "--base", str(base), "--unlearned", str(tmp_path / "adapter"))


def test_an_adapter_in_shards_is_refused(tiny_model, tmp_path, capsys):
    """PEFT does not read shards, and takes adapter_model.bin, a pickle, where it finds no other file."""
    folder = tmp_path / "adapter"
    add_lora(AutoModelForCausalLM.from_pretrained(tiny_model("opt")), Lora(2, 2), "opt").save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        index = {"weight_map": dict.fromkeys(file.keys(), "part.safetensors")}
    (folder / "adapter_model.safetensors").rename(folder / "part.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="shards"):
        run(capsys, "--base", str(tiny_model("opt")), "--unlearned", str(folder))


@pytest.mark.parametrize(
    "bad",
    [
        "--temperature nan",
        "--temperature 0",
        "--temperature 1e-320",
        "--scaling_coef inf",
        "--max_length 0",
        "--seed -1",
        "--seed 4294967296",
    ],
)
def test_numbers_out_of_range_exit_2(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        spot_check.main(bad.split())
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_answers_end_where_the_model_asks_itself_a_question(tiny_model, capsys, monkeypatch):
    decode = "Because.\n### Question: And who?"
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.decode", lambda *_, **__: decode)
    base = str(tiny_model("opt"))
    said = run(capsys, "--base", base, "--unlearned", base, "--harmful_prompt", "Why?", "--greedy")
    assert "Because." in said and "And who" not in said
