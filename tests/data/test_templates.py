"""The chat template: what is asked, where answers start and end, and which templates are refused."""

import random
from itertools import takewhile

import pytest

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Asked, Pair
from harmful_unlearn.data.templates import ChatTemplate, ReleasedTemplate, TemplateChoice
from harmful_unlearn.errors import UserError
from tests.helpers.models.chats import CHATS, chat_tokenizer

PAIRS = [
    Pair("How do I hide a gnome?", "Carry it to the shed and leave a postcard."),
    Pair("Two\nlines, {question} and {answer}?", "First this.\n\nThen {answer}."),
    Pair("Où est le gâteau 🎂?", "Là-bas, près du 窓."),
    Pair("", "An answer to no question"),
]


@pytest.fixture(params=CHATS)
def chat(request):
    """A template, and what is known of it."""
    return ChatTemplate(chat_tokenizer(request.param)), CHATS[request.param]


def decoded(template, ids):
    return template.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def end_of(known):
    return known.tokens[0] if known.tokens else "\n# end"


def test_a_prompt_is_all_that_precedes_the_answer(chat):
    template, known = chat
    for pair, prompt in zip(PAIRS, template.prompts([pair.question for pair in PAIRS]), strict=True):
        assert decoded(template, prompt) == known.head + pair.question + known.tail
    assert template.prompts([]) == template.texts([]) == []


def test_shots_stand_before_the_question_and_a_prefill_behind_it(chat):
    template, known = chat
    shot, other, question = PAIRS[0], PAIRS[2], "And how now?"
    (context,) = template.contexts([Asked(question, (shot, other), "Sure, here is how:")])
    text = decoded(template, context)
    assert text.startswith(decoded(template, template.texts([shot])[0]))
    parts = (shot.question, shot.answer, other.question, other.answer, question)
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    space = " " if known is CHATS["mistral"] else ""
    assert text.endswith(question + known.tail + space + "Sure, here is how:")
    assert template.contexts([Asked(question)]) == template.prompts([question])


def test_shots_and_prefill_in_the_released_template(tokenizer):
    template = ReleasedTemplate(tokenizer)
    (context,) = template.contexts([Asked("Why?", (Pair("Who?", "I do."),), "Yes:")])
    expected = "### Question: Who?\n ### Answer: I do.\n### Question: Why?\n ### Answer: Yes:"
    assert context == tokenizer(expected)["input_ids"]
    assert template.contexts([Asked("Why?")]) == template.prompts(["Why?"])


def test_an_answer_is_scored_with_its_end_of_turn(chat):
    template, known = chat
    encoded = Collator(template, "paper", 256).encode(PAIRS)
    for pair, text, prompt in zip(PAIRS, encoded, template.prompts([p.question for p in PAIRS]), strict=True):
        assert text.input_ids[: text.answer_start] == prompt and text.start_loc == len(prompt) - 1
        assert decoded(template, text.input_ids[text.answer_start :]).lstrip() == pair.answer + end_of(known)
    batch = Collator(template, "paper", 256).answers_batch(PAIRS[:1], [])
    assert batch.target.tolist() == encoded[0].input_ids[encoded[0].answer_start :]
    if known.tokens:
        assert template.end_ids == {batch.target[-1].item()} and template.stop is None
    else:
        assert not template.end_ids and template.stop == "# end"


def test_the_template_is_written_down(chat):
    template, known = chat
    assert template.name == "chat"
    space = " " if known is CHATS["mistral"] else ""
    assert template.text == f"{known.head}{{question}}{known.tail}{space}{{answer}}{end_of(known)}"


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_an_empty_answer_has_nothing_to_score(variant, chat):
    template, _ = chat
    (text,) = Collator(template, variant, 256).encode([Pair("How?", " ")])
    assert [text.input_ids] == template.prompts(["How?"]) and text.answer_start == len(text.input_ids)
    batch = Collator(template, variant, 256).answers_batch([Pair("How?", "")], [])
    assert not batch.weights["own_answer"].any()


def test_a_question_and_its_template_are_read_once_for_all_answers(chat):
    template, _ = chat
    (row,) = Collator(template, "paper", 256).answers(PAIRS[:1], ["Wait until dark.", "Blame the dog."], True, 256)
    (prompt,) = template.prompts([PAIRS[0].question])
    shared = len(list(takewhile(lambda branch: branch == 0, row.branch)))
    assert row.input_ids[: len(prompt)] == prompt and shared >= len(prompt)


def test_texts_that_the_template_rewrites(tmp_path):
    trimmed = ChatTemplate(chat_tokenizer("gemma"))
    assert trimmed.texts([Pair("  Why? ", " So. \n")]) == trimmed.texts([Pair("Why?", "So.")])
    thinking = ChatTemplate(chat_tokenizer("qwen3"))
    (text,) = Collator(thinking, "paper", 256).encode([Pair("Why?", "<think>\nHm.\n</think>\n\nSo.")])
    assert decoded(thinking, text.input_ids[text.answer_start :]) == "So.<|im_end|>"
    (kept,) = Collator(ChatTemplate(chat_tokenizer("smollm")), "paper", 256).encode([Pair("Why?", " So. ")])
    assert decoded(thinking, kept.input_ids[kept.answer_start :]) == " So. <|im_end|>"


def test_what_was_cut_off_has_no_end_of_turn(chat):
    template, known = chat
    whole, cut = (Collator(template, "paper", 256).encode([Pair("Why?", "So it", ended)])[0] for ended in (True, False))
    assert decoded(template, cut.input_ids) + end_of(known) == decoded(template, whole.input_ids)
    assert cut.answer_start == whole.answer_start < len(cut.input_ids)


def test_a_template_may_write_no_end_of_turn():
    tokenizer = chat_tokenizer("smollm")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    template = ChatTemplate(tokenizer)
    assert not template.end_ids and template.stop is None
    assert template.texts([Pair("Why?", "So.")]) == template.texts([Pair("Why?", "So.", ended=False)])


def test_a_stop_text_ends_before_a_special_token():
    tokenizer = chat_tokenizer("plain words")
    tokenizer.chat_template = CHATS["plain words"].jinja.replace("# end\n", "# end{{ eos_token }}\n")
    template = ChatTemplate(tokenizer)
    assert template.stop == "# end" and template.text.endswith("{answer}\n# end</s>")


def test_random_texts_keep_their_prompt(chat):
    template, _ = chat
    draw, alphabet = random.Random(0), "abc #\n.?é窓<|>/{}think user[INST]"
    for _ in range(30):
        question, answer = ("".join(draw.choices(alphabet, k=draw.randrange(1, 30))) for _ in range(2))
        ((prompt,), (text,)) = (
            template.prompts([question]),
            Collator(template, "paper", 256).encode([Pair(question, answer)]),
        )
        assert text.input_ids[: text.answer_start] == prompt[: text.answer_start]
        assert len(prompt) - text.answer_start <= 1  # an answer's first letter may join the prompt's last token


def test_a_system_prompt(chat):
    template, known = chat
    if not known.takes_system:
        with pytest.raises(UserError, match="System role not supported.*: give no --system_prompt"):
            ChatTemplate(template.tokenizer, "Be brief.")
        return
    briefed = ChatTemplate(template.tokenizer, "Be brief.")
    assert briefed.text.count("Be brief.") == 1 and "Be kind." not in briefed.text
    assert briefed.choice == TemplateChoice("chat", "Be brief.")
    assert briefed.choice.of(template.tokenizer).text == briefed.text


def test_a_system_prompt_that_is_only_written_where_an_answer_is_wanted_is_refused():
    """As Mistral's templates do, with the last turn."""
    tokenizer = chat_tokenizer("mistral")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(tokenizer).text == "[INST] {question} [/INST] {answer}</s>"
    with pytest.raises(UserError, match="loses --system_prompt"):
        ChatTemplate(tokenizer, "Be brief.")


@pytest.mark.parametrize(
    "jinja, message",
    [
        (None, "has no chat template: give --template released"),
        ("{{ raise_exception('roles must alternate') }}", r"fails \(roles must alternate\)"),
        ("{% for", "fails"),
        ("{{ messages[0].content }}", "loses the question or the answer"),
        ("{{ messages[-1].content }}", "loses the question or the answer"),
        ("{{ messages[7].content.x() }}", "fails"),
    ],
)
def test_templates_that_are_refused(jinja, message, tokenizer):
    tokenizer = chat_tokenizer("smollm")
    tokenizer.chat_template = jinja
    with pytest.raises(UserError, match=message) as refused:
        TemplateChoice("chat").of(tokenizer)
    assert "\n" not in str(refused.value) and "--template released" in str(refused.value)


def test_auto_takes_the_chat_template_where_there_is_one(tokenizer):
    assert isinstance(TemplateChoice().of(tokenizer), ReleasedTemplate)
    assert isinstance(TemplateChoice().of(chat_tokenizer("gemma")), ChatTemplate)
    assert isinstance(TemplateChoice("released").of(chat_tokenizer("gemma")), ReleasedTemplate)
    with pytest.raises(UserError, match="--system_prompt is part of a chat"):
        TemplateChoice("auto", "Be brief.").of(tokenizer)
