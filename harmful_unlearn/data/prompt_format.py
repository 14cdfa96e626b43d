"""A question, an answer, and the authors' text of both."""

from dataclasses import dataclass

# The authors' template (implementation detail 1). The answer comes last: an empty one leaves the prompt.
PROMPT_TEMPLATE = "### Question: {question}\n ### Answer: {answer}"
NEXT_QUESTION = "### Question:"  # a model that continues with a question of its own has ended its answer


@dataclass(frozen=True)
class Pair:
    """A question and one answer to it.

    Attributes:
        ended: whether the answer is whole. In a chat the end of turn follows only a whole one.
    """

    question: str
    answer: str
    ended: bool = True


@dataclass(frozen=True)
class Asked:
    """What a model is asked.

    Attributes:
        shots: questions with answers that precede the question, as if they had been asked and answered.
        prefill: the beginning of the answer, which the model continues.
    """

    question: str
    shots: tuple[Pair, ...] = ()
    prefill: str = ""


def format_pair(question: str, answer: str) -> str:
    """The authors' text of a question with its answer."""
    return PROMPT_TEMPLATE.format(question=question, answer=answer)


def format_prefix(question: str) -> str:
    """The authors' text before the answer, with its trailing space."""
    return format_pair(question, "")


def prompt_text(question: str) -> str:
    """What a model is asked: the prefix without its trailing space, which belongs to the answer's first token."""
    return format_prefix(question).rstrip()
