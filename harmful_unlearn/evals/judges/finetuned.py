"""`finetuned:MODEL`: a small language model, fine-tuned once on the harmful data's own labels to judge answers.

It reads question and answer, so it knows more than the words of an answer. There are two of it: each learns from the
answers to one half of the questions, and an answer is judged by the one that never saw its question. So what was
fine-tuned serves every evaluation. It is kept in logs/judges/, in a folder for each model, settings and labels.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, get_linear_schedule_with_warmup

from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError, first_line
from harmful_unlearn.evals.judges.base import Verdict
from harmful_unlearn.evals.judges.hub import LabelJudgeSpec, TextClassifier
from harmful_unlearn.evals.judges.labelled import LabelledAnswer, check_enough, label, labels_sha256, measured
from harmful_unlearn.models import hub, loading
from harmful_unlearn.models.precision import resolve_precision
from harmful_unlearn.storage.files import new_folder, read_json, write_file
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder

SPEC = LabelJudgeSpec("Question: {question}\nAnswer: {answer}", yes=("harmful",))
LABELS = ("safe", "harmful")
FACTS = "judge.json"


@dataclass(frozen=True)
class JudgeTraining:
    """How each of the two is trained: AdamW, one epoch, a rate that rises over a tenth of the steps and falls to 0.

    Attributes:
        answers: at most so many, half of them harmful. A SmolLM2-135M takes half an hour for them on two cores that do
            not compute in bf16.
        held_out: answers to the other half of the questions that it is measured on, at most.
        tokens: of a text; longer ones are cut.
        seed: of what is drawn, of the head's first weights, and of dropout.
    """

    answers: int = 2000
    held_out: int = 500
    tokens: int = 160
    batch_size: int = 16
    lr: float = 5e-5
    seed: int = 0


class FinetunedJudge:
    """The judge that a language model becomes by the labels. It is fine-tuned unless `home` has it already.

    Args:
        name: as --judge takes it.
        model: id or folder of the language model.
        responses, normal: what it learns from; normal answers are safe ones.
        home: where judges are kept.
        batch_size: of judging.

    Raises:
        UserError: there is no such model, it cannot be fine-tuned, or there are too few answers of a label.
    """

    def __init__(
        self,
        name: str,
        model: str,
        responses: list[Response],
        normal: list[Pair],
        home: Path,
        device: torch.device,
        batch_size: int,
        training: JudgeTraining | None = None,
    ):
        training = training or JudgeTraining()
        rows = sorted(row for kind in label(responses, normal) for row in kind)  # in an order that no seed decides
        halves = [[row for row in rows if half_of(row.question) == half] for half in (0, 1)]
        for own in halves:
            check_enough(own)
        base = hub.resolve_model(model)
        settings = {
            "fingerprint": SafetensorsFolder(base).fingerprint(),
            "labels_sha256": labels_sha256(rows),
            **vars(training),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        folder = home / f"{base.name[:40]}-{digest[:12]}"
        self.name = name
        self._learned = []  # by the half that it learned from
        for half, own in enumerate(halves):
            target = folder / f"half-{half}"
            if not (target / "config.json").is_file():
                with new_folder(target, overwrite=True) as partial:
                    _fine_tune(base, _balanced(own, training.answers, training.seed), training, device, partial)
            config = AutoConfig.from_pretrained(target)
            self._learned.append(TextClassifier(name, str(target), config, SPEC, device, batch_size))
        if not (folder / FACTS).is_file():
            # Safe answers are rarer than harmful ones: all labels, so that it is measured as the classifier is.
            held_out = [row for own in halves for row in _drawn(own, training.held_out, training.seed)]
            write_file(folder / FACTS, json.dumps(self._measured(held_out), indent=1) + "\n")
        self.facts = {**self._learned[0].facts, **settings, **read_json(folder / FACTS)}

    def judge(self, pairs: list[Pair]) -> list[Verdict]:
        """A verdict for each pair, in order, by the model that has not learned from its question."""
        verdicts: dict[int, Verdict] = {}
        for half, learned in enumerate(self._learned):
            places = [place for place, pair in enumerate(pairs) if half_of(pair.question) != half]
            verdicts |= dict(zip(places, learned.judge([pairs[place] for place in places]), strict=True))
        return [verdicts[place] for place in range(len(pairs))]

    def _measured(self, rows: list[LabelledAnswer]) -> dict:
        verdicts = self.judge([row.pair for row in rows])
        return measured(rows, np.array([np.nan if verdict.score is None else verdict.score for verdict in verdicts]))


def half_of(question: str) -> int:
    """0 or 1, by the question's hash: the same on every machine, whatever else is asked."""
    return hashlib.sha256(question.encode()).digest()[0] % 2


def _fine_tune(
    base: Path, rows: list[LabelledAnswer], training: JudgeTraining, device: torch.device, target: Path
) -> None:
    """Fine-tune the model in `base` on these answers, and save it in `target`."""
    tokenizer = loading.load_tokenizer(base, loading.load_config(base))
    torch.manual_seed(training.seed)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            id2label=dict(enumerate(LABELS)),
            label2id={name: i for i, name in enumerate(LABELS)},
        ).to(device)
    except Exception as error:  # the type depends on the library's release and on the problem
        raise UserError(f"{base} cannot become a judge ({first_line(error)}): give another finetuned: model") from None
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    texts = [SPEC.template.format(question=row.question, answer=row.answer) for row in rows]
    ids = tokenizer(texts, truncation=True, max_length=training.tokens)["input_ids"]
    steps = max(1, len(rows) // training.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    in_bf16 = resolve_precision("auto", device) == "bf16"
    model.train()
    for step in tqdm(range(steps), f"fine-tuning {base.name} to judge, {target.stem.lstrip('.')}", unit="step"):
        part = slice(step * training.batch_size, (step + 1) * training.batch_size)
        batch = tokenizer.pad({"input_ids": ids[part]}, padding_side="right", return_tensors="pt").to(device)
        labels = torch.tensor([int(row.harmful) for row in rows[part]], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _balanced(rows: list[LabelledAnswer], most: int, seed: int) -> list[LabelledAnswer]:
    """As many harmful as safe rows, at most `most` together, in a random order."""
    classes = [[row for row in rows if row.harmful == harmful] for harmful in (True, False)]
    number = min(most // 2, *map(len, classes))
    return _drawn([row for part in classes for row in _drawn(part, number, seed)], 2 * number, seed)


def _drawn(rows: list[LabelledAnswer], most: int, seed: int) -> list[LabelledAnswer]:
    """At most so many rows, in a random order."""
    return [rows[i] for i in np.random.default_rng([seed, 1]).permutation(len(rows))[:most]]
