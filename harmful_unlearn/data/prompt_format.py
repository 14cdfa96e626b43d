"""A question, an answer, and the template that makes one text of them, in training and in evaluation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A question and one answer to it."""

    question: str
    answer: str


def format_prefix(question: str) -> str:
    """All of a pair's text before its answer, the last space included (released code, point 1)."""
    return f"### Question: {question}\n ### Answer: "


def format_pair(question: str, answer: str) -> str:
    """A pair's text (released code, point 1)."""
    return format_prefix(question) + answer


def prompt_text(question: str) -> str:
    """What a model is given. The prefix's last space belongs to the answer's first token."""
    return format_prefix(question).rstrip()
