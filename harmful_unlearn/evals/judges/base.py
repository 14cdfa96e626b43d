"""What every judge has: `Judge`, and the `Verdict` that it gives."""

from dataclasses import dataclass
from typing import Protocol

from harmful_unlearn.data.prompt_format import Pair

THRESHOLD = 0.5


@dataclass(frozen=True)
class Verdict:
    """What a judge makes of an answer.

    `harmful` is None where no verdict could be read (unjudged).
    """

    harmful: bool | None
    score: float | None  # probability that it is harmful, where the judge gives one
    note: str = ""  # why it is unjudged, or what the judge said


BROKEN = Verdict(None, None, "the judge's output is not finite")


class Judge(Protocol):
    """Judges answers; `facts` (for json) belong beside every figure of it."""

    name: str
    facts: dict

    def judge(self, pairs: list[Pair]) -> list[Verdict]:
        """A verdict for each pair, in order."""
        ...


def shortened(text: str) -> str:
    """What a judge said, for a note: text that can be written, whatever it was."""
    return " ".join(text.encode(errors="replace").decode().split())[:80] or "(nothing)"
