"""The chat in a terminal: one line is one question, and the models answer one after the other."""

import argparse
import contextlib
import signal
import sys
from contextlib import closing
from dataclasses import dataclass

from harmful_unlearn.chat.conversation import Conversation
from harmful_unlearn.cli.flag_types import sampling_temperature
from harmful_unlearn.cli.running import one_line
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.inference.generation import Decoding

with contextlib.suppress(ImportError):  # not on every system; it gives input() arrow keys and a history
    import readline  # noqa: F401

HELP = """\
One line is one question. Each model remembers its own answers.
//...           a question that starts with one /
/reset          forget the conversation
/greedy         the likeliest token each time
/temperature X  sample at temperature X (0.7, for example)
/help           this text
/quit           end, like Ctrl-D
Ctrl-C          stop the running answer; the next model then answers"""


@dataclass
class TerminalChat:
    """A chat with several models.

    Attributes:
        seed: with the number of the question, the seed of its answers.
        asked: how many questions were asked.
    """

    conversations: list[Conversation]
    decoding: Decoding
    seed: int
    asked: int = 0

    def run(self) -> None:
        """Read lines and obey or answer them, until /quit or the end of input."""
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        print(f"{HELP}\n{self._how()}")
        is_going_on = True
        while is_going_on:
            try:
                line = input("\nyou> ").strip()
                if line.startswith("/") and not line.startswith("//"):
                    is_going_on = self._obey(line)
                elif line:
                    self._ask(line.removeprefix("/"))
            except EOFError:
                print()
                is_going_on = False
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D ends the chat)")

    def _how(self) -> str:
        is_greedy = self.decoding.temperature is None
        return "answers: " + ("greedy" if is_greedy else f"sampled at temperature {self.decoding.temperature:g}")

    def _obey(self, line: str) -> bool:
        """Obey a command. Returns whether the chat goes on."""
        match line.split():
            case ["/quit"]:
                return False
            case ["/help"]:
                print(HELP)
            case ["/reset"]:
                for conversation in self.conversations:
                    conversation.turns.clear()
                print("(the conversation is forgotten)")
            case ["/greedy"]:
                self.decoding = Decoding()
                print(f"({self._how()})")
            case ["/temperature", text]:
                try:
                    self.decoding = Decoding(sampling_temperature(text))
                    print(f"({self._how()})")
                except argparse.ArgumentTypeError as error:
                    print(f"(/temperature: {printable(str(error))})")
            case ["/temperature", *_]:
                print("(/temperature takes one number, 0.7 for example)")
            case ["/quit" | "/help" | "/reset" | "/greedy" as command, *_]:
                print(f"({command} takes no value)")
            case [command, *_]:
                print(f"(there is no command {printable(command)}: /help lists them, and // begins a question with /)")
        return True

    def _ask(self, question: str) -> None:
        self.asked += 1
        refused: dict[str, list[str]] = {}  # by what is wrong with the question
        for conversation in self.conversations:
            label = one_line(conversation.label)
            try:
                note = conversation.make_room(question)
            except UserError as error:
                refused.setdefault(str(error), []).append(label)
                continue
            if note:
                print(f"{label}: {note}")
            print(f"\033[1m{label}:\033[0m " if sys.stdout.isatty() else f"{label}: ", end="", flush=True)
            answer = conversation.answer(question, self.decoding, (self.seed, self.asked))
            with CtrlC() as ctrl_c, closing(answer):
                for piece in answer:
                    print(printable(piece), end="", flush=True)
                    if ctrl_c.is_pressed:
                        break
            ending = conversation.ending(ctrl_c.is_pressed)
            print(f" {ending}" if ending and conversation.turns[-1].answer else ending)
        for problem, labels in refused.items():
            print(f"{', '.join(labels)}: ({problem})")


class CtrlC:
    """Within the block, Ctrl-C is only noted.

    Attributes:
        is_pressed: whether it was pressed in the block.
    """

    is_pressed = False

    def __enter__(self) -> "CtrlC":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.is_pressed = True


def printable(text: str) -> str:
    """A text whose control characters are spaces, but for line breaks and tabs: a terminal would obey the others."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else " " for sign in text)
