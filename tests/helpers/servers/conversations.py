"""A conversation whose answers are known, for the tests of what shows them."""

import time
from collections.abc import Generator

from harmful_unlearn.chat.conversation import Conversation
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError


class Scripted(Conversation):
    """Answers every question with `pieces`, and keeps how it was asked.

    Attributes:
        asked: (question, decoding, seed) of each question.
        ends: whether it ends its answers.
        seconds: for each piece.
    """

    def __init__(self, label: str, *pieces: str, ends: bool = True, seconds: float = 0.0):
        super().__init__(label=label, model=None, template=None, max_length=99)
        self.pieces, self.ends, self.seconds, self.asked = pieces, ends, seconds, []

    def make_room(self, question: str) -> str:
        if "long" in question:
            raise UserError("the question has 100 tokens: ask a shorter one")
        return "(forgot the oldest turn)" if "forget" in question else ""

    def answer(self, question, decoding, seed) -> Generator[str, None, None]:
        self.asked.append((question, decoding, seed))
        said: list[str] = []
        try:
            for piece in self.pieces:
                time.sleep(self.seconds)
                said.append(piece)
                yield piece
        finally:
            is_whole = self.ends and len(said) == len(self.pieces)
            self.turns.append(Pair(question, "".join(said), is_whole))
