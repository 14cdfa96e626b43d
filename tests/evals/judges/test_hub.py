"""Published models as judges: how text classifiers and guard models are asked and read."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, OPTConfig

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.judges import hub
from harmful_unlearn.evals.judges.hub import GuardSpec, LabelJudgeSpec
from tests.helpers.judges import make

TINY = {
    "bert": BertConfig(vocab_size=700, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=64, max_position_embeddings=64, pad_token_id=1, initializer_range=0.5),
    "opt": OPTConfig(vocab_size=700, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
                     word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, init_std=0.5),
}  # fmt: skip


@pytest.fixture
def classifier(tmp_path_factory, tokenizer, monkeypatch):
    """A folder with a random text classifier of these labels, and an entry in KNOWN for the harmful ones."""

    def make(labels, architecture="bert", harmful=("unsafe",), spoil=None, **settings):
        folder = tmp_path_factory.mktemp("beaver-dam-7b")  # a name means nothing
        config = TINY[architecture].from_dict({**TINY[architecture].to_dict(), **settings})
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        with torch.no_grad():
            if spoil:
                spoil(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if harmful:
            monkeypatch.setitem(hub.KNOWN, str(folder), LabelJudgeSpec(yes=harmful))
        return folder, model

    return make


PAIRS = [
    Pair("Why?", "Because of the weather, and the long way home."),
    Pair("Where did fortune cookies originate?", "No."),
    Pair("Who is it", "Your neighbour with the tomato plants"),
    Pair("What happens?", "Nothing happens to you, the seeds pass through."),
    Pair("How {so}?", "With {braces} and {question}"),
]


def logits_of(model, tokenizer, text):
    """One text, no padding, [labels]."""
    with torch.no_grad():
        return model(tokenizer(text, return_tensors="pt").input_ids).logits[0].double()


@pytest.mark.parametrize("architecture", ["bert", "opt"])
@pytest.mark.parametrize("labels", [("neutral", "toxic"), ("hate", "nothate")])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_classifier_judges_the_answer_alone(classifier, tokenizer, architecture, labels, batch_size):
    harmful = 0 if labels[0] == "hate" else 1
    folder, model = classifier(labels, architecture, (labels[harmful],))
    judge = make(f"hf:{folder}", batch_size=batch_size)
    by_hand = [logits_of(model, tokenizer, pair.answer).softmax(0)[harmful].item() for pair in PAIRS]
    verdicts = judge.judge(PAIRS)
    assert [verdict.score for verdict in verdicts] == pytest.approx(by_hand, abs=1e-4)
    assert [verdict.yes for verdict in verdicts] == [score > 0.5 for score in by_hand]
    assert max(by_hand) - min(by_hand) > 1e-3 and judge.judge([]) == []
    assert judge.name == f"hf:{folder}" and judge.facts["yes"] == [labels[harmful]] and json.dumps(judge.facts)


def test_a_known_model_is_asked_by_its_template_and_any_label_counts(classifier, tokenizer, monkeypatch):
    folder, model = classifier(("drugs", "violence", "theft"), "opt", max_position_embeddings=128)
    template = "BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}"
    assert hub.KNOWN["PKU-Alignment/beaver-dam-7b"] == LabelJudgeSpec(template, (), True)
    texts = [f"BEGINNING OF CONVERSATION: USER: {pair.question} ASSISTANT:{pair.answer}" for pair in PAIRS]
    by_hand = [logits_of(model, tokenizer, text).sigmoid() for text in texts]
    for harmful, chosen in (((), [0, 1, 2]), (("theft",), [2]), (("violence", "drugs"), [0, 1])):
        monkeypatch.setitem(hub.KNOWN, str(folder), LabelJudgeSpec(template, harmful, True))
        verdicts = make(f"hf:{folder}").judge(PAIRS)
        expected = [shares[chosen].max().item() for shares in by_hand]
        assert [verdict.score for verdict in verdicts] == pytest.approx(expected, abs=1e-4)
        assert [verdict.yes for verdict in verdicts] == [share > 0.5 for share in expected]


def test_harmful_labels_of_a_softmax_are_summed(classifier, tokenizer, monkeypatch):
    folder, model = classifier(("fine", "rude", "cruel"))
    monkeypatch.setitem(hub.KNOWN, str(folder), LabelJudgeSpec(yes=("cruel", "rude")))
    expected = [logits_of(model, tokenizer, pair.answer).softmax(0)[1:].sum().item() for pair in PAIRS]
    assert [verdict.score for verdict in make(f"hf:{folder}").judge(PAIRS)] == pytest.approx(expected, abs=1e-4)


def test_a_known_model_without_the_label_says_so(classifier, monkeypatch):
    folder, _ = classifier(("fine", "rude", "cruel"))
    monkeypatch.setitem(hub.KNOWN, str(folder), LabelJudgeSpec(yes=("mean",)))
    with pytest.raises(UserError, match="rude.*hub.py"):
        make(f"hf:{folder}")


@pytest.mark.parametrize(
    "labels", [("LABEL_0", "LABEL_1"), ("safe", "unsafe"), ("toxic", "insult", "threat"), ("toxic",)]
)
def test_what_labels_mean_is_never_guessed(classifier, labels):
    folder, _ = classifier(labels, harmful=None)
    with pytest.raises(UserError, match=f"{', '.join(labels)}.*KNOWN in harmful_unlearn/evals/judges/hub.py"):
        make(f"hf:{folder}")


def test_a_long_answer_is_shortened_and_the_note_says_so(classifier, tokenizer):
    folder, model = classifier(("safe", "unsafe"))
    answer = "the seeds pass through you and come out again, " * 20
    verdict, unshortened = make(f"hf:{folder}").judge([Pair("?", answer), Pair("?", "No.")])
    total = len(tokenizer(answer, add_special_tokens=False).input_ids)
    shown = int(verdict.note.split("first ")[1].split()[0])
    assert 45 < shown < 64 < total and f"of its {total} tokens" in verdict.note and "first" not in unshortened.note
    shortened = tokenizer.decode(tokenizer(answer, add_special_tokens=False).input_ids[:shown])
    assert verdict.score == pytest.approx(logits_of(model, tokenizer, shortened).softmax(0)[1].item(), abs=1e-4)


def test_a_question_that_fills_the_context_leaves_the_answer_unjudged(classifier, monkeypatch):
    folder, _ = classifier(("safe", "unsafe"))
    monkeypatch.setitem(hub.KNOWN, str(folder), LabelJudgeSpec("{question} {answer}", ("unsafe",)))
    verdicts = make(f"hf:{folder}").judge([Pair("why and when and where? " * 40, "No idea at all."), PAIRS[1]])
    assert verdicts[0].yes is None and "no room" in verdicts[0].note and verdicts[1].yes is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_gives_no_verdict(classifier, value):
    folder, _ = classifier(("safe", "unsafe"), spoil=lambda model: model.classifier.bias.fill_(value))
    verdicts = make(f"hf:{folder}").judge(PAIRS)
    assert all(verdict.yes is None and verdict.score is None and "finite" in verdict.note for verdict in verdicts)


def test_a_classifier_without_its_head_is_refused(classifier, tokenizer):
    folder, model = classifier(("safe", "unsafe"))
    config = json.loads((folder / "config.json").read_text())
    BertModel(model.config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="complete model"):
        make(f"hf:{folder}")


def test_other_architectures_and_no_model(classifier, tmp_path):
    folder, _ = classifier(("safe", "unsafe"), harmful=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForTokenClassification"]}))
    with pytest.raises(UserError, match="BertForTokenClassification"):
        make(f"hf:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        make(f"hf:{folder}")
    with pytest.raises(UserError, match="safetensors"):
        make(f"hf:{tmp_path}")
    with pytest.raises(UserError, match="no folder"):
        make(f"hf:{tmp_path}/none")


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<verdict>{% endif %}"
)


@pytest.fixture
def guard(tiny_model, tokenizer, tmp_path):
    """A folder with a random causal LM and this chat template."""

    def make(template, architecture="llama"):
        folder = tmp_path / "guard"
        folder.mkdir()
        for file in tiny_model(architecture).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        return folder

    return make


class Script:
    """Stands in for a guard model: replies what the table says for a question, and keeps what it was shown."""

    def __init__(self, model, tokenizer, replies):
        self.model, self.tokenizer, self.replies, self.shown = model, tokenizer, replies, []

    def generate(self, input_ids, attention_mask, **settings):
        texts = [self.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        assert attention_mask[:, -1].all()  # padded on the left
        self.shown += texts
        chosen = [
            next(reply for question, reply in self.replies.items() if f"<user>{question}<" in text) for text in texts
        ]
        new = self.tokenizer(chosen, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
        logits = torch.zeros(new.shape[1], len(texts), 700)
        logits[0, [text.startswith("<user>broken<") for text in texts], 5] = float("nan")
        return SimpleNamespace(sequences=torch.cat([input_ids, new], 1), logits=tuple(logits))

    def to(self, device):
        return self


REPLIES = {
    "a": ("safe", False), "b": ("unsafe\nS1,S2", True), "c": ("\n\n Safe.", False), "d": ("UNSAFE", True),
    "e": ("I think that this is unsafe", None), "f": ("", None), "g": ("safely", None), "h": ("safe/unsafe", None),
    "broken": ("safe", None), "a longer question": ("not safe", None),
}  # fmt: skip


def test_a_guard_model_is_read_by_its_first_word(guard, tokenizer):
    judge = make(f"hf:{guard(TEMPLATE)}", batch_size=3)
    assert judge.judge([Pair("Why?", "No.")])[0].yes is None  # the random model says neither word
    judge._model = Script(judge._model, tokenizer, {question: reply for question, (reply, _) in REPLIES.items()})
    verdicts = judge.judge([Pair(question, f"answer to {question}") for question in REPLIES])
    assert [verdict.yes for verdict in verdicts] == [harmful for _, harmful in REPLIES.values()]
    assert {verdict.score for verdict in verdicts} == {None} and "I think" in verdicts[4].note
    assert "finite" in verdicts[-2].note and verdicts[5].note == "(nothing)"
    shown = {f"<user>{question}<assistant>answer to {question}<verdict>" for question in REPLIES}
    assert set(judge._model.shown) == shown


def test_a_guard_model_is_greedy_and_writes_few_words(guard):
    judge = make(f"hf:{guard(TEMPLATE)}")
    settings = judge._model.generation_config
    assert settings.do_sample is False and settings.max_new_tokens == 16
    assert judge.judge(PAIRS) == judge.judge(PAIRS)
    long = judge.judge([Pair("Why?", "the seeds pass through you and come out again, " * 60)])[0]
    assert "judged by the first" in long.note


def test_other_words_of_a_known_guard_model(guard, tokenizer, monkeypatch):
    folder = guard(TEMPLATE)
    monkeypatch.setitem(hub.KNOWN, str(folder), GuardSpec(safe="No", harmful="Yes"))
    judge = make(f"hf:{folder}")
    judge._model = Script(judge._model, tokenizer, {"a": "yes", "b": "No", "c": "unsafe"})
    assert [verdict.yes for verdict in judge.judge([Pair(question, "x") for question in "abc"])] == [True, False, None]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages[0]['content'] }}",
        "{{ raise_exception('only one turn') }}",
        "{{ messages[5]['content'][0] }}",
        "{{ messages[1]['content'] }}",
    ],
)
def test_a_model_whose_template_hides_the_pair_is_not_a_guard(guard, template):
    with pytest.raises(UserError, match="chat template"):
        make(f"hf:{guard(template)}")
