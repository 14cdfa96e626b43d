"""The chat in a terminal: in this process, and in a pseudo-terminal of its own."""

import os
import shutil
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from harmful_unlearn.chat.terminal import HELP, TerminalChat, printable
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.evals.inference.generation import Decoding
from harmful_unlearn.storage.files import ROOT
from tests.helpers.running.terminals import CTRL_C, CTRL_D, Terminal
from tests.helpers.servers.conversations import Scripted


@pytest.fixture
def talk(monkeypatch, capsys):
    """`talk(conversations, lines)`: what is printed while these lines are typed; the input then ends."""

    def run(conversations: list[Scripted], *lines: str) -> str:
        typed = iter(lines)

        def read(prompt: str) -> str:
            try:
                line = next(typed)
            except StopIteration:
                raise EOFError from None
            if line == CTRL_C:
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", read)
        with open(os.devnull) as nothing:
            monkeypatch.setattr(sys, "stdin", nothing)
            TerminalChat(conversations, Decoding(0.9), seed=7).run()
        return capsys.readouterr().out

    return run


def test_questions_and_commands(talk):
    base, other = Scripted("base", "Yes", " and no."), Scripted("sku", "N", "", "o.")
    lines = ("Why?", "", "/greedy", "So?", "/temperature 0.5", "/reset", " How? ", "/help", "/quit", "Never")
    screen = talk([base, other], *lines)
    assert "base: Yes and no.\n" in screen and "sku: No.\n" in screen
    assert screen.index("sampled at temperature 0.9") < screen.index("(answers: greedy)")
    assert screen.index("(answers: greedy)") < screen.index("(answers: sampled at temperature 0.5)")
    assert screen.count(HELP) == 2 and "forgotten" in screen
    assert base.asked == other.asked
    decodings = {"Why?": Decoding(0.9), "So?": Decoding(), "How?": Decoding(0.5)}
    assert base.asked == [(*how, (7, number)) for number, how in enumerate(decodings.items(), 1)]
    assert [turn.question for turn in base.turns] == ["How?"]


def test_notes(talk):
    screen = talk([Scripted("base"), Scripted("sku", "Well", ends=False)], "a long one", "forget", CTRL_C, "And?")
    assert screen.count("the question has 100 tokens") == 1
    assert "base, sku: (the question has 100 tokens: ask a shorter one)" in screen
    assert "base: (forgot the oldest turn)\nbase: (nothing)\n" in screen
    assert "sku: Well (cut off by --max_length 99)\n" in screen
    assert "(/quit or Ctrl-D ends the chat)" in screen  # and it went on
    assert screen.count("sku: Well") == 2


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/temperature 0", "give a number from 0.01, not '0'"),
        ("/temperature nan", "give a number from 0.01"),
        ("/temperature 1e-320", "give a number from 0.01"),
        ("/temperature", "/temperature takes one number"),
        ("/temperature 1 2", "/temperature takes one number"),
        ("/greedy now", "/greedy takes no value"),
        ("/quit now", "/quit takes no value"),
        ("/quti", "there is no command /quti: /help lists them, and // begins a question with /"),
        ("/ what", "there is no command /:"),
        ("/\x1b[2J", "there is no command / [2J"),
    ],
)
def test_wrong_commands(line, answer, talk):
    base = Scripted("base", "Yes.")
    screen = talk([base], line, "Why?")
    assert answer in screen and "\x1b" not in screen
    assert base.asked == [("Why?", Decoding(0.9), (7, 1))]


def test_a_question_may_start_with_a_slash(talk):
    base = Scripted("base", "Yes.")
    talk([base], "//etc/passwd?", "///", "//")
    assert [question for question, *_ in base.asked] == ["/etc/passwd?", "//", "/"]


def test_control_characters_stay_out_of_the_terminal(talk):
    evil = Scripted("ba\x1bse", "a\x1b", "]0;title\x07b\r\x9b2J\u202ec\x00", "\td\n", "é猫😀")
    screen = talk([evil], "Why?")
    assert "ba se: a ]0;title b  2J c \td\né猫😀\n" in screen
    assert printable("\x7f\u2028\ud800") == "   "


def test_a_pseudo_terminal():
    """Ctrl-C stops the answer, and only that; Ctrl-D ends the chat."""

    def chat() -> int:
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        slow = Scripted("base", *(f"word-{number} " for number in range(2000)), seconds=0.01)
        return exit_code(TerminalChat([slow, Scripted("sku", "No.")], Decoding(), seed=0).run)

    terminal = Terminal(chat)
    terminal.wait_for("you> ")
    terminal.type("Why?\n")
    terminal.wait_for("base:")
    terminal.wait_for("word-3 ")
    terminal.type(CTRL_C)
    assert "word-300" not in terminal.wait_for("(stopped)")
    terminal.wait_for("sku:")
    terminal.wait_for("No.")
    terminal.wait_for("you> ")
    terminal.type("a line that is not sent")
    time.sleep(0.3)  # a signal between the prompt and the system's read would be seen at the next key only
    terminal.type(CTRL_C)
    terminal.wait_for("(/quit or Ctrl-D ends the chat)")
    terminal.wait_for("you> ")
    terminal.type(CTRL_D)
    assert terminal.end() == 0


@pytest.mark.slow
def test_the_command_in_a_pseudo_terminal(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.config.max_position_embeddings, model.generation_config.eos_token_id = 2**16, None  # it never ends
    model.save_pretrained(folder)
    command = [sys.executable, str(ROOT / "main.py"), "--base", str(folder), "--unlearned", str(folder)]
    command += ["--chat", "--greedy", "--max_length", "50000"]
    terminal = Terminal(lambda: os.execv(sys.executable, command), patience=240)
    terminal.wait_for("answers: greedy")

    def ask() -> list[str]:
        """The beginnings of both models' answers, which are then stopped."""
        terminal.wait_for("you> ")
        terminal.type("How do I hide a gnome?\n")
        answers = []
        for label in ("base:", "unlearned:"):
            terminal.wait_for(f"{label}\033[0m ")
            answers.append(terminal.read(40))
            terminal.type(CTRL_C)
            terminal.wait_for("(stopped)")
        return answers

    first = ask()
    assert first[0] == first[1]  # one model twice
    assert ask() != first  # there is a history
    terminal.wait_for("you> ")
    terminal.type("/reset\n")
    terminal.wait_for("forgotten")
    assert ask() == first
    for typed, answer in (("/temperature 5", "sampled at temperature 5"), ("/reset", "forgotten")):
        terminal.wait_for("you> ")
        terminal.type(f"{typed}\n")
        terminal.wait_for(answer)
    assert ask() != first
    for typed, answer in (("/greedy", "answers: greedy"), ("/reset", "forgotten"), ("/wrong", "no command /wrong")):
        terminal.wait_for("you> ")
        terminal.type(f"{typed}\n")
        terminal.wait_for(answer)
    assert ask() == first
    terminal.wait_for("you> ")
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    assert "Traceback" not in terminal.screen
