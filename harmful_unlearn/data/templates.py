"""The template that makes one text of a question and an answer, in training and in evaluation.

"released" is the authors' template. "chat" is the tokenizer's own chat template: a user turn, and an assistant turn
with its end of turn.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from harmful_unlearn.data.prompt_format import (
    NEXT_QUESTION,
    PROMPT_TEMPLATE,
    Asked,
    Pair,
    format_pair,
    format_prefix,
    prompt_text,
)
from harmful_unlearn.errors import UserError, first_line

TEMPLATES = ("auto", "released", "chat")
# Some chat templates write today's date, and a model would then be asked other prompts tomorrow.
A_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Template(ABC):
    """Makes the tokens of one model of questions and answers.

    Attributes:
        tokenizer: the model's. Its padding and truncation are not used.
        name: "released" or "chat".
        system_prompt: of a chat, if it is not the template's own.
        text: a whole text, with "{question}" and "{answer}" in place of both; what run.json keeps.
        end_ids: tokens that end an answer, beside those of the model.
        stop: a text that ends an answer, if it is not such a token.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    system_prompt: str | None = None
    text: str
    end_ids: frozenset[int] = frozenset()
    stop: str | None = None

    @property
    def choice(self) -> "TemplateChoice":
        """What to choose for the same template of another tokenizer."""
        return TemplateChoice(self.name, self.system_prompt)

    @abstractmethod
    def texts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The tokens of questions with their answers. Behind an empty answer there is nothing."""

    @abstractmethod
    def prefixes(self, questions: Sequence[str]) -> list[list[int]]:
        """The tokens before an answer, whose number the released code computes with (implementation detail 3)."""

    @abstractmethod
    def contexts(self, asked: Sequence[Asked]) -> list[list[int]]:
        """The tokens that a model is asked with, and continues."""

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """The tokens that a model is asked questions with."""
        return self.contexts([Asked(question) for question in questions])


class ReleasedTemplate(Template):
    """The authors' template."""

    name, text, stop = "released", PROMPT_TEMPLATE, NEXT_QUESTION

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def texts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        return self._ids([format_pair(pair.question, pair.answer) for pair in pairs])

    def prefixes(self, questions: Sequence[str]) -> list[list[int]]:
        return self._ids([format_prefix(question) for question in questions])

    def contexts(self, asked: Sequence[Asked]) -> list[list[int]]:
        texts = []
        for one in asked:
            shots = "".join(format_pair(shot.question, shot.answer) + "\n" for shot in one.shots)
            texts.append(shots + prompt_text(one.question) + (f" {one.prefill}" if one.prefill else ""))
        return self._ids(texts)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts)["input_ids"] if texts else []  # the tokenizer adds its BOS


class ChatTemplate(Template):
    """The tokenizer's chat template.

    A prompt is all that precedes the answer in a conversation, and so is the same in training and evaluation. A text
    ends with the end of turn, where the template writes one and the answer is whole (`Pair.ended`).

    Raises:
        UserError: there is no chat template, it refuses the system prompt or such a conversation, or it loses the
            question, the answer or the system prompt.
    """

    name = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None):
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: give --template released")
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        try:
            self._jinja = A_FIXED_DATE + tokenizer.get_chat_template()
            (whole,) = self._render([Pair("{question}", "{answer}")])
            turns = self._turns("{question}")
            asked = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, chat_template=self._jinja
            )
        except Exception as error:  # jinja's own errors, and whatever a template raises
            fix = "--template released" if system_prompt is None else "no --system_prompt, or --template released"
            raise UserError(f"the chat template fails ({first_line(error)}): give {fix}") from None
        before, answer, after = whole.rpartition("{answer}")
        if not answer or "{question}" not in before:
            raise UserError("the chat template loses the question or the answer: give --template released")
        if system_prompt and system_prompt.strip() not in before:  # some write it only where an answer is wanted
            raise UserError("the chat template loses --system_prompt before an answer: leave it out")
        # A space between a model's prompt and its answer belongs to the answer's first token.
        between = before.removeprefix(asked)
        self._space = between if between != before and not between.strip() else ""
        self._rest = ""  # what follows the end of turn
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"] if after.strip() else []
        words = list(takewhile(lambda token: token not in special, ids))
        if words:  # answers are searched for it without their special tokens
            self.stop = tokenizer.decode(words).strip()
        elif ids:
            self.end_ids = frozenset(ids[:1])
            self._rest = after.partition(tokenizer.decode(ids[:1]))[2]
        self._end = after.removesuffix(self._rest).rstrip()  # empty where the template writes no end of turn
        self.text = whole.removesuffix(self._rest).rstrip()

    def texts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        prompts = iter(self._contexts([Asked(pair.question) for pair in pairs if not pair.answer.strip()]))
        rendered = iter(self._render([pair for pair in pairs if pair.answer.strip()]))
        whole = [
            next(rendered).removesuffix(self._rest).rstrip() if pair.answer.strip() else next(prompts) for pair in pairs
        ]
        return self._ids(
            [
                text if pair.ended or not pair.answer.strip() else text.removesuffix(self._end)
                for pair, text in zip(pairs, whole, strict=True)
            ]
        )

    def prefixes(self, questions: Sequence[str]) -> list[list[int]]:
        return self.prompts(questions)

    def contexts(self, asked: Sequence[Asked]) -> list[list[int]]:
        return self._ids(self._contexts(asked))

    def _contexts(self, asked: Sequence[Asked]) -> list[str]:
        rendered = self._render([Pair(one.question, "{answer}") for one in asked], [one.shots for one in asked])
        before = [text.rpartition("{answer}")[0] for text in rendered]
        return [
            text + one.prefill if one.prefill else text.removesuffix(self._space)
            for text, one in zip(before, asked, strict=True)
        ]

    def _turns(self, question: str, answer: str | None = None, shots: Sequence[Pair] = ()) -> list[dict[str, str]]:
        turns = [("system", self.system_prompt)]
        turns += [turn for shot in shots for turn in (("user", shot.question), ("assistant", shot.answer))]
        turns += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in turns if content is not None]

    def _render(self, pairs: list[Pair], shots: Sequence[Sequence[Pair]] | None = None) -> list[str]:
        if not pairs:
            return []
        before = shots or [()] * len(pairs)
        conversations = [self._turns(pair.question, pair.answer, own) for pair, own in zip(pairs, before, strict=True)]
        return self.tokenizer.apply_chat_template(conversations, tokenize=False, chat_template=self._jinja)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # The template has written the tokenizer's BOS, if there is to be one.
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


class TemplateChoice(NamedTuple):
    """Which template to use: a name of TEMPLATES, and a chat's system prompt (None: the chat template's own)."""

    name: str = "auto"
    system_prompt: str | None = None

    def of(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template for this tokenizer; "auto" is its chat template, if it has one.

        Raises:
            UserError: as `ChatTemplate`, or there is a system prompt and no chat.
        """
        if self.name == "chat" or (self.name == "auto" and tokenizer.chat_template):
            return ChatTemplate(tokenizer, self.system_prompt)
        if self.system_prompt is not None:
            raise UserError("--system_prompt is part of a chat, and the template here is released: leave it out")
        return ReleasedTemplate(tokenizer)
