"""Asking a model in batches: the same answers as one by one, as by `model.generate`, and after an interruption too."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from harmful_unlearn.data.prompt_format import Asked, prompt_text
from harmful_unlearn.data.templates import ChatTemplate, ReleasedTemplate
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.inference.generation import Decoding, Request, batches_of, configure, generate
from tests.helpers.models.chats import CHATS, chat_tokenizer
from tests.helpers.models.tiny import TINY

QUESTIONS = [
    "Why?", "What happens to you if you eat watermelon seeds?", "Where did fortune cookies originate?",
    "Who is it", "How do I keep tomato plants healthy in a very dry summer?",
]  # fmt: skip
GREEDY = Decoding()
SAMPLED = Decoding(temperature=0.9, top_k=0)
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 700}
ROTARY = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256, "head_dim": 8}
ARCHITECTURES = {
    **TINY,
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=700, n_positions=256),  # learned positions
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=700),  # takes no positions
    "gemma3": Gemma3TextConfig(  # a sliding window that is shorter than the prompts, in some layers
        **ROTARY, tie_word_embeddings=False, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": MistralConfig(**ROTARY, sliding_window=8),  # in all layers
    "lfm2": Lfm2Config(  # convolutions
        **SIZES, tie_word_embeddings=False, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]
    ),
    "qwen3_next": Qwen3NextConfig(  # linear attention
        **ROTARY, layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_experts=2, num_experts_per_tok=1,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=700, state_size=4),  # no keys and values
}  # fmt: skip


@pytest.fixture(scope="module", params=["opt", "llama", "qwen2"])
def model(request, tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model(request.param)).eval()


def varied(architecture):
    """A random model whose next tokens are not all about equally likely."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def requests_of(*decodings, seed=0, questions=QUESTIONS):
    return [Request(Asked(q), decoding, (seed, i)) for decoding in decodings for i, q in enumerate(questions)]


def ask(model, tokenizer, requests, tokens_per_batch=100, new=12):
    """The answers by their index: text, and whether they ended."""
    return answers_in(ReleasedTemplate(tokenizer), model, requests, tokens_per_batch, new)


def answers_in(template, model, requests, tokens_per_batch=100, new=12):
    batches = generate(model, template, new, tokens_per_batch, requests)
    return {answer.index: (answer.text, answer.ended) for batch in batches for answer in batch}


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED, Decoding(0.9, 5)])
def test_an_answer_does_not_depend_on_the_others_of_its_batch(decoding, model, tokenizer):
    together, alone = (ask(model, tokenizer, requests_of(decoding), tokens) for tokens in (10_000, 1))
    assert together == alone and sorted(together) == list(range(len(QUESTIONS)))


def test_each_answer_has_a_random_stream_of_its_own(model, tokenizer):
    whole = ask(model, tokenizer, requests_of(SAMPLED))
    assert whole == ask(model, tokenizer, requests_of(SAMPLED)) != ask(model, tokenizer, requests_of(SAMPLED, seed=1))
    rest = ask(model, tokenizer, requests_of(SAMPLED)[3:])  # as after an interruption
    assert rest == {index - 3: whole[index] for index in (3, 4)}
    same = ask(model, tokenizer, [Request(Asked("Why?"), SAMPLED, (0, i)) for i in range(4)])
    assert len(set(same.values())) == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_those_of_the_library(architecture, tokenizer):
    model = varied(architecture)
    ends = list(range(2, 700, 12))  # so that some answers end early
    model.generation_config.eos_token_id = ends
    configure(model, tokenizer, GREEDY, max_new_tokens=20)
    rows = tokenizer([prompt_text(q) for q in QUESTIONS], return_tensors="pt", padding=True, padding_side="left")
    made = model.generate(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    expected = {}
    for index, tokens in enumerate(made[:, rows["input_ids"].shape[1] :].tolist()):
        end = next((at for at, token in enumerate(tokens) if token in ends), None)
        expected[index] = (tokenizer.decode(tokens[:end], skip_special_tokens=True).strip(), end is not None)
    assert sum(ended for _, ended in expected.values()) > 0 and len(set(expected.values())) > 1
    answers = ask(model, tokenizer, requests_of(GREEDY, SAMPLED), tokens_per_batch=10_000, new=20)
    assert {index: answers[index] for index in expected} == expected


def test_a_model_with_an_adapter_is_asked(model, tokenizer):
    expected = ask(model, tokenizer, requests_of(GREEDY, SAMPLED))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()  # does nothing yet
    assert ask(adapted, tokenizer, requests_of(GREEDY, SAMPLED)) == expected
    adapted.unload()


def test_greedy_is_the_likeliest_token_by_hand(model, tokenizer):
    ids = tokenizer(prompt_text(QUESTIONS[1]), return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    made = ids[0, start:].tolist()
    end = made.index(2) if 2 in made else None
    by_hand = tokenizer.decode(made[:end], skip_special_tokens=True).partition("### Question:")[0].strip()
    assert ask(model, tokenizer, requests_of(GREEDY))[1] == (by_hand, end is not None)


@pytest.mark.parametrize("decoding", [Decoding(0.7, 3), Decoding(0.3, 0)])
def test_answers_are_drawn_with_the_models_probabilities(decoding, tokenizer):
    """The shares of 4000 answers of two tokens against the exact ones, within five standard errors."""
    model = varied("llama")
    ids = tokenizer(prompt_text("Why?"), return_tensors="pt").input_ids

    def distribution(ids):  # [rows, vocabulary]
        with torch.no_grad():
            logits = model(ids).logits[:, -1].double() / decoding.temperature
        if decoding.top_k:
            logits[logits < logits.topk(decoding.top_k).values[:, -1:]] = -torch.inf
        return logits.softmax(-1)

    first = distribution(ids)[0].topk(decoding.top_k or 50)
    second = distribution(torch.cat([ids.repeat(len(first.indices), 1), first.indices[:, None]], 1))
    exact = Counter()
    for a, probability, row in zip(first.indices.tolist(), first.values.tolist(), second, strict=True):
        for b in row.topk(decoding.top_k or 50).indices.tolist():
            exact[tokenizer.decode([a, b], skip_special_tokens=True).strip()] += probability * row[b].item()
    number = 4000
    requests = [Request(Asked("Why?"), decoding, (5, i)) for i in range(number)]
    drawn = Counter(text for text, _ in ask(model, tokenizer, requests, new=2).values())
    assert exact.total() == pytest.approx(1, abs=0.1)
    for text, probability in exact.most_common(9):
        error = (probability * (1 - probability) / number) ** 0.5
        assert probability > 0.005 and abs(drawn[text] / number - probability) < 5 * error


def test_a_prompt_is_read_once_and_answers_that_have_ended_leave(tokenizer):
    model, read = varied("llama"), []
    model.generation_config.eos_token_id = list(range(2, 700, 12))
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True)
    requests = requests_of(GREEDY, SAMPLED, Decoding(0.5, 5))
    ask(model, tokenizer, requests, tokens_per_batch=10_000, new=30)
    assert read[0][0] == len(QUESTIONS) and len(QUESTIONS) < read[1][0] <= len(requests) and read[1][1] == 1
    rows = [shape[0] for shape in read[1:]]
    assert rows == sorted(rows, reverse=True) and rows[-1] < len(requests) / 2


def test_batches_are_within_the_limit_and_hold_every_request_once(tokenizer):
    requests = requests_of(GREEDY, SAMPLED)
    batches = batches_of(requests, ReleasedTemplate(tokenizer), 10, 120)
    assert sorted(index for batch in batches for index in batch) == list(range(10)) and 1 < len(batches) < 5
    lengths = [[len(tokenizer(prompt_text(requests[i].asked.question)).input_ids) for i in batch] for batch in batches]
    assert all(len(batch) * (max(batch) + 10) <= 120 for batch in lengths)
    assert [n for batch in lengths for n in batch] == sorted((n for batch in lengths for n in batch), reverse=True)
    assert [len(batch) for batch in batches_of(requests, ReleasedTemplate(tokenizer), 10, 1)] == [
        2
    ] * 5  # a prompt is never split


class Scripted(torch.nn.Linear):
    """Stands in for a model: says fixed tokens whatever it is asked."""

    def __init__(self, model, said):
        super().__init__(1, 1)
        self.config, self.generation_config, self.said = model.config, model.generation_config, [*said]

    def forward(self, input_ids, attention_mask):
        logits = torch.nn.functional.one_hot(torch.tensor([[self.said.pop(0)]]), 710)
        return SimpleNamespace(logits=logits.expand(len(input_ids), 1, -1))


@pytest.mark.parametrize(
    "said, text, ended",
    [
        ("a b c</s> d", "a b c", True),
        ("a b c", "a b c", False),
        ("a b\n### Question: and so on", "a b", True),
        ("</s> a", "", True),
    ],
)
def test_where_an_answer_ends(said, text, ended, model, tokenizer):
    said = tokenizer(said, add_special_tokens=False).input_ids
    script = Scripted(model, said)
    script.generation_config.eos_token_id = [2]
    answers = ask(script, tokenizer, requests_of(GREEDY, questions=["Why?"]), new=len(said))
    assert answers[0] == (text, ended) and bool(script.said) == ended  # and nothing is made after its end


@pytest.mark.parametrize("name", CHATS)
def test_an_answer_ends_with_its_turn(name, model):
    """The model itself has another end: what follows the end of turn is neither made nor read."""
    template = ChatTemplate(chat_tokenizer(name))
    end = CHATS[name].tokens[0] if CHATS[name].tokens else "\n# end"
    said = template.tokenizer(f"So it is.{end} And", add_special_tokens=False).input_ids
    script = Scripted(model, said)
    script.generation_config.eos_token_id = 5
    answers = answers_in(template, script, requests_of(GREEDY, questions=["Why?"]), new=len(said))
    assert answers[0] == ("So it is.", True) and script.said
    script.said = template.tokenizer("### Question: one", add_special_tokens=False).input_ids
    answers = answers_in(template, script, requests_of(GREEDY, questions=["Why?"]), new=len(script.said))
    assert answers[0] == ("### Question: one", False)  # which is nothing special in a chat


def test_what_does_not_fit_is_an_error_that_says_what_would(model, tokenizer):
    with pytest.raises(UserError, match="max_new_tokens of at most"):
        ask(model, tokenizer, requests_of(GREEDY), new=250)
