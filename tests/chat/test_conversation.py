"""A conversation: the spot check's answers, history, room, and text as it is written."""

from contextlib import closing
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM

import main as spot_check
from harmful_unlearn.chat.conversation import Conversation, check_length, open_conversations
from harmful_unlearn.data.prompt_format import Asked, Pair
from harmful_unlearn.data.templates import ReleasedTemplate, TemplateChoice
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.inference.generation import Decoding, Request, generate
from harmful_unlearn.models.lora import Lora, add_lora
from tests.helpers.models.chats import chat_tokenizer

GREEDY = Decoding()
LENGTH = 70  # tokens; the question has 20 to 40
QUESTION = "How do I hide a gnome?"


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """A folder with a base that has a chat template, two adapters of it, and another model."""
    home = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer("smollm")
    for name, seed in (("base", 0), ("other", 1)):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    for number in (1, 2):
        adapted = add_lora(AutoModelForCausalLM.from_pretrained(home / "base"), Lora(4, 4), str(home / "base"))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, number)
        adapted.save_pretrained(home / f"adapter-{number}")
    return home


@pytest.fixture
def opened(folders):
    """`opened("chat")`: conversations with the base, an adapter, another model, and a second adapter."""

    def open_all(template: str, max_length: int = LENGTH) -> list[Conversation]:
        models = {name: folders / name for name in ("adapter-1", "other", "adapter-2")}
        return open_conversations(folders / "base", models, TemplateChoice(template), max_length)

    return open_all


def said(conversation: Conversation, question: str = QUESTION, decoding: Decoding = GREEDY, seed: int = 0) -> str:
    """The answer, as its pieces make it."""
    text = "".join(conversation.answer(question, decoding, (seed, 1)))
    assert conversation.turns[-1].answer == text
    return text


@pytest.mark.parametrize("template", ["chat", "released"])
def test_greedy_answers_are_those_of_the_spot_check(template, folders, opened):
    """Also of models that share the base's weights, whichever was asked before."""
    flags = ["--greedy", "--max_length", str(LENGTH), "--template", template]
    settings = spot_check.parse_flags([*flags, "--base", str(folders / "base")])
    conversations = opened(template)
    base, adapted, other, second = conversations
    assert base.model is adapted.model is second.model is not other.model
    expected = {}
    for label in (conversation.label for conversation in conversations):
        asked = (folders / "base", folders / label) if "adapter" in label else (folders / label,)
        (expected[label],) = spot_check.answer_all(TemplateChoice(template), [QUESTION], settings, *asked)
    assert len({*expected.values()}) == 4
    for conversation in (*conversations, adapted, base):
        conversation.turns.clear()
        assert said(conversation) == expected[conversation.label]


@pytest.mark.parametrize("template", ["chat", "released"])
def test_the_history_is_the_models_own_answers(template, opened):
    base, adapted, *_ = opened(template)
    first = [said(conversation) for conversation in (base, adapted)]
    assert first[0] != first[1]
    for conversation, answer in zip((base, adapted), first, strict=True):
        conversation.turns[0] = short = Pair(QUESTION, answer[:20])
        text = said(conversation, "Why?")
        request = Request(Asked("Why?", (short,)), GREEDY, (0,))
        prompt = conversation.template.contexts([request.asked])[0]
        (batch,) = generate(conversation.model, conversation.template, LENGTH - len(prompt), 4096, [request])
        assert text == batch[0].text
        assert [turn.question for turn in conversation.turns] == [QUESTION, "Why?"]
        assert answer[:20].strip() in conversation.template.tokenizer.decode(prompt)


def test_an_answer_stays_within_the_length_and_old_turns_make_room(opened):
    conversation = opened("chat", 110)[0]
    context = conversation.template.contexts
    for question in ("One?", "Two?", "Three?"):
        conversation.turns.append(Pair(question, "A short answer."))
    notes = []
    for number in range(4):
        question = f"And {number}?"
        notes.append(conversation.make_room(question))
        used = len(context([Asked(question, tuple(conversation.turns))])[0])
        assert used <= 110 * 3 / 4
        conversation.turns.append(Pair(question, "A short answer."))
    assert "(forgot the oldest turn, to stay within 110 tokens)" in notes
    conversation.turns[-1:] = [Pair("x" * 400, "y")]
    assert "oldest turns" in conversation.make_room("Why?") and conversation.turns == []
    conversation.turns.append(Pair("Why?", "So."))
    with pytest.raises(UserError, match="ask a shorter one, or give a larger --max_length"):
        conversation.make_room("Why " * 200)
    assert conversation.turns == [Pair("Why?", "So.")]


def test_lengths(tiny_model):
    folder = tiny_model("opt")
    assert (check_length(folder, None), check_length(folder, 200)) == (256, 200)
    with pytest.raises(UserError, match="give a --max_length of at most that"):
        check_length(folder, 257)


def test_sampling_follows_its_seed_and_temperature(opened):
    conversation = opened("chat")[0]

    def asked(*how) -> str:
        conversation.turns.clear()
        return said(conversation, QUESTION, *how)

    hot = Decoding(1.5)
    assert asked(hot, 1) == asked(hot, 1) != asked(hot, 2)
    assert asked(Decoding(1e-6), 1) == asked(GREEDY)


def test_a_closed_answer_is_kept_as_far_as_it_was(opened):
    conversation = opened("released")[0]
    with closing(conversation.answer(QUESTION, GREEDY, (0,))) as pieces:
        text = "".join(islice(pieces, 9))
    (turn,) = conversation.turns
    assert text and turn == Pair(QUESTION, text, ended=False)
    assert conversation.ending(stopped=True) == "(stopped)"
    said(conversation)
    assert f"--max_length {LENGTH}" in conversation.ending(stopped=False)


@pytest.fixture
def write(tiny_model, tokenizer, monkeypatch):
    """`write("text")`: the pieces of an answer whose tokens are the text's, and the conversation."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))

    def answer(text: str, *more: int) -> tuple[list[str], Conversation]:
        tokens = iter([*tokenizer(text, add_special_tokens=False)["input_ids"], *more])
        monkeypatch.setattr(Decoding, "choose", lambda *_: torch.tensor([next(tokens)]))
        conversation = Conversation(label="m", model=model, template=ReleasedTemplate(tokenizer), max_length=256)
        return list(conversation.answer("Why?", GREEDY, (0,))), conversation

    return answer


def test_characters_are_never_broken(write, tokenizer):
    text = "Naïve 猫 👩‍🚀 said: 😀!"
    pieces, conversation = write(f" {text}", tokenizer.eos_token_id)
    assert "".join(pieces) == text == conversation.turns[0].answer and conversation.turns[0].ended
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces.count("") > 4 and len(pieces) > 20  # token by token
    assert conversation.ending(stopped=True) == ""  # it was over


def test_the_stop_text_ends_an_answer_and_is_never_shown(write):
    pieces, conversation = write(" # One ### Quest.\n ### Question: And")
    assert "".join(pieces) == "# One ### Quest." == conversation.turns[0].answer and conversation.turns[0].ended
    # The end may be the stop text's beginning until the next token is known.
    assert all("# One ### Quest.".startswith("".join(pieces[:n])) for n in range(len(pieces)))


def test_nothing_is_said_of_nothing(write, tokenizer):
    pieces, conversation = write("", tokenizer.eos_token_id)
    assert pieces == [""] and conversation.ending(stopped=False) == "(nothing)"
