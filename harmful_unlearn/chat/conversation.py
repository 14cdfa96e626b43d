"""A conversation with one model: its own history, and answers that are yielded while they are written."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel

from harmful_unlearn.data.prompt_format import Asked, Pair
from harmful_unlearn.data.templates import Template, TemplateChoice
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import BASE, load_model
from harmful_unlearn.evals.inference.generation import Decoding, Reader, all_ends
from harmful_unlearn.models import loading
from harmful_unlearn.models.lora import load_adapter
from harmful_unlearn.models.offload import execution_device
from harmful_unlearn.models.precision import resolve_precision

DEFAULT_LENGTH = 1024  # tokens of a conversation; a model that never ends its answers stops there
ROOM = 4  # old turns are dropped until an answer has one part in so many of the conversation's tokens


@dataclass(kw_only=True)
class Conversation:
    """What one model was asked, and answered.

    Attributes:
        label: the model's name for the user.
        model: in eval mode, on its device. Several conversations may share a PeftModel, one at a time.
        max_length: tokens of the conversation, the answer that is written included.
        adapter: which of a PeftModel's adapters is this model; None: its base.
        turns: questions with the model's own answers, oldest first; `ended` says whether the model ended the answer.
    """

    label: str
    model: PreTrainedModel | PeftModel
    template: Template
    max_length: int
    adapter: str | None = None
    turns: list[Pair] = field(default_factory=list)

    def make_room(self, question: str) -> str:
        """Drop the oldest turns until the question and an answer fit.

        Returns:
            What to tell the user; empty if nothing was dropped.

        Raises:
            UserError: the question alone does not fit; no turn was dropped.
        """
        alone = len(self._context(question, []))
        if alone >= self.max_length:
            raise UserError(
                f"the question has {alone} tokens, and a conversation at most {self.max_length}: ask a shorter one, "
                "or give a larger --max_length"
            )
        limit = self.max_length - self.max_length // ROOM
        before = len(self.turns)
        while self.turns and len(self._context(question, self.turns)) > limit:
            del self.turns[0]
        dropped = before - len(self.turns)
        turns = "oldest turn" if dropped == 1 else f"{dropped} oldest turns"
        return f"(forgot the {turns}, to stay within {self.max_length} tokens)" if dropped else ""

    @torch.inference_mode()
    def answer(self, question: str, decoding: Decoding, seed: Sequence[int]) -> Generator[str, None, None]:
        """The text that each token adds to the answer; empty where a token ends inside of a character.

        The answer ends with the model's end of turn, at `max_length` tokens, or where the iterator is closed. Question
        and answer are then the last of `turns`. Call `make_room` first.

        Args:
            seed: of this answer's random numbers.
        """
        if isinstance(self.model, PeftModel):
            if self.adapter:
                self.model.base_model.enable_adapter_layers()
                self.model.set_adapter(self.adapter)
            else:
                self.model.base_model.disable_adapter_layers()
        context = self._context(question, self.turns)
        ends = all_ends(self.model, self.template.end_ids)
        device, draws = execution_device(self.model), np.random.default_rng(seed)
        tokens: list[int] = []
        text, ended = "", False
        try:
            mask = torch.ones(1, self.max_length, dtype=torch.long, device=device)
            read = Reader(self.model, torch.tensor([context], device=device), mask)
            while True:
                chosen = decoding.choose(read.logits, torch.tensor(draws.random(1, np.float32), device=device))
                tokens += chosen.tolist()
                ended = tokens[-1] in ends
                is_last = ended or len(context) + len(tokens) == self.max_length
                longer, is_cut = self._text(tokens[:-1] if ended else tokens, is_last)
                ended |= is_cut
                known = len(commonprefix([text, longer]))  # some tokenizers take a space before a sign back
                text = longer
                yield text[known:]
                if is_last or is_cut:
                    break
                read.next(chosen)
        finally:
            self.turns.append(Pair(question, text, ended))

    def ending(self, stopped: bool) -> str:
        """What to tell the user of the last answer; empty if the model ended it.

        Args:
            stopped: whether the user stopped it.
        """
        last = self.turns[-1]
        if last.ended:
            return "" if last.answer else "(nothing)"
        return "(stopped)" if stopped else f"(cut off by --max_length {self.max_length})"

    def _context(self, question: str, turns: list[Pair]) -> list[int]:
        return self.template.contexts([Asked(question, tuple(turns))])[0]

    def _text(self, tokens: list[int], is_whole: bool) -> tuple[str, bool]:
        """The answer's text so far, and whether the template's stop text ended it.

        What the next token may still change is left out: a part of a character, of the stop text, and spaces.
        """
        text = self.template.tokenizer.decode(tokens, skip_special_tokens=True)
        stop = self.template.stop or ""
        if stop and stop in text:
            return text.partition(stop)[0].strip(), True
        if not is_whole:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            begun = max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            text = text[: len(text) - begun]
        return text.strip(), False


def check_length(folder: Path, max_length: int | None) -> int:
    """The number of tokens of a conversation with the model in `folder`.

    Args:
        max_length: None: DEFAULT_LENGTH, or the model's context if that is less.

    Raises:
        UserError: `max_length` exceeds the model's context.
    """
    limit = loading.context_length(loading.load_config(folder))
    if max_length and max_length > limit:
        raise UserError(f"{folder} takes {limit} tokens: give a --max_length of at most that")
    return max_length or min(DEFAULT_LENGTH, limit)


def open_conversations(
    base: Path,
    models: dict[str, Path],
    template: TemplateChoice,
    max_length: int | None = None,
    device_map: str | None = None,
) -> list[Conversation]:
    """Load the models: a conversation with the base, and one with each of `models`.

    Adapters share the base's weights; every other model is loaded beside it.

    Args:
        models: label -> folder of a model, or of a LoRA adapter of the base.
        max_length: tokens of a conversation; None: as `check_length`.

    Raises:
        UserError: `max_length` exceeds a model's context, or a model cannot be loaded.
    """
    precision = resolve_precision("auto", PartialState().device)
    adapters = [label for label, folder in models.items() if is_adapter(folder)]
    folders = {BASE: base, **{label: folder for label, folder in models.items() if label not in adapters}}
    lengths = {label: check_length(folder, max_length) for label, folder in folders.items()}
    loaded = {label: load_model(folder, precision, device_map, template) for label, folder in folders.items()}
    shared, base_template = loaded[BASE]
    names = {label: f"adapter_{number}" for number, label in enumerate(adapters)}
    for label, name in names.items():
        shared = load_adapter(shared, models[label], name)
    loaded |= {label: (shared, base_template) for label in (BASE, *adapters)}
    return [
        Conversation(
            label=label,
            model=loaded[label][0],
            template=loaded[label][1],
            max_length=lengths[BASE if label in names else label],
            adapter=names.get(label),
        )
        for label in (BASE, *models)
    ]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter rather than a complete model."""
    return (folder / "adapter_config.json").is_file()
