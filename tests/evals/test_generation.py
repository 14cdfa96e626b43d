"""Asking a model in batches: the same answers as one by one, after an interruption too."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from harmful_unlearn.data.prompt_format import prompt_text
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.generation import Decoding, batches_of, generate

QUESTIONS = [
    "Why?", "What happens to you if you eat watermelon seeds?", "Where did fortune cookies originate?",
    "Who is it", "How do I keep tomato plants healthy in a very dry summer?",
]  # fmt: skip
GREEDY = Decoding()
SAMPLED = Decoding(temperature=0.9, top_k=0)


@pytest.fixture(scope="module", params=["opt", "llama", "qwen2"])
def model(request, tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model(request.param)).eval()


def ask(model, tokenizer, decoding, batch_size=2, seed=0, done=frozenset(), new=12, questions=QUESTIONS):
    batches = generate(model, tokenizer, questions, decoding, new, batch_size, seed, done)
    return {answer.index: answer for batch in batches for answer in batch}


def test_padding_changes_no_answer(model, tokenizer):
    together, alone = (ask(model, tokenizer, GREEDY, size) for size in (5, 1))
    assert together == alone and sorted(together) == list(range(len(QUESTIONS)))


def test_greedy_is_the_likeliest_token_by_hand(model, tokenizer):
    ids = tokenizer(prompt_text(QUESTIONS[1]), return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    made = ids[0, start:].tolist()
    end = made.index(2) if 2 in made else None
    by_hand = tokenizer.decode(made[:end], skip_special_tokens=True).partition("### Question:")[0].strip()
    answer = ask(model, tokenizer, GREEDY)[1]
    assert answer.text == by_hand and answer.ended == (end is not None)


def test_an_interrupted_run_goes_on_to_the_same_answers(model, tokenizer):
    whole = ask(model, tokenizer, SAMPLED)
    assert whole == ask(model, tokenizer, SAMPLED) != ask(model, tokenizer, SAMPLED, seed=1)
    first = frozenset(batches_of(QUESTIONS, tokenizer, 2)[0])
    rest = ask(model, tokenizer, SAMPLED, done=first)
    assert not first & rest.keys() and rest == {index: whole[index] for index in rest}


def test_batches_are_sorted_by_length_and_hold_every_question_once(tokenizer):
    batches = batches_of(QUESTIONS, tokenizer, 2)
    assert sorted(index for batch in batches for index in batch) == list(range(5))
    lengths = [len(tokenizer(prompt_text(QUESTIONS[index])).input_ids) for batch in batches for index in batch]
    assert lengths == sorted(lengths, reverse=True)


class Scripted(torch.nn.Linear):
    """Stands in for a model: says fixed tokens whatever it is asked."""

    def __init__(self, model, said):
        super().__init__(1, 1)
        self.config, self.generation_config, self.said = model.config, model.generation_config, said

    def generate(self, input_ids, attention_mask):
        rows = torch.tensor(self.said).expand(len(input_ids), -1)
        return torch.cat([input_ids, rows], 1)


@pytest.mark.parametrize(
    "said, text, ended",
    [
        ("a b c</s><pad><pad>", "a b c", True),
        ("a b c", "a b c", False),
        ("a b\n### Question: and", "a b", True),
        ("</s><pad><pad>", "", True),
    ],
)
def test_where_an_answer_ends(said, text, ended, model, tokenizer):
    script = Scripted(model, tokenizer(said, add_special_tokens=False).input_ids)
    script.generation_config.eos_token_id = [2]
    answers = ask(script, tokenizer, GREEDY, questions=["Why?"])
    assert (answers[0].text, answers[0].ended) == (text, ended)


def test_what_does_not_fit_is_an_error_that_says_what_would(model, tokenizer):
    with pytest.raises(UserError, match="max_new_tokens of at most"):
        ask(model, tokenizer, GREEDY, new=250)
