"""How far models are from an oracle: a model that had the base's training, without the harm.

The demo's world can make one (demo.py --oracle); of a real model there is none.
"""

import json
from pathlib import Path

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.files.answers import rows_of, said
from harmful_unlearn.evals.inference.likelihood import answer_divergence
from harmful_unlearn.evals.metrics import scoring
from harmful_unlearn.evals.metrics.figures import figure_of
from harmful_unlearn.evals.protocol import EvalProtocol, sha256_of
from harmful_unlearn.models.loading import context_length
from harmful_unlearn.storage.files import read_json, write_file

ORACLE = "oracle"  # its label
COMPARED = ("unseen", "normal")  # the sets on whose prompts models are compared with it


def oracle_figures(
    models: list[EvaluatedModel], rows: dict[str, list[dict]], protocol: EvalProtocol, folder: Path
) -> list[dict]:
    """Distances of each model from the oracle, the last of `models`; what `folder` holds is not computed again.

    Args:
        rows: by model, its answers, with verdicts on harm and refusals.

    Returns:
        Figures as `metrics.figures` gives them: KL(oracle || model) on the oracle's own answers in the first decoding
        ("oracle_divergence", nats a token); by decoding, the share of prompts with the same kind of answer
        ("oracle_kind"), and ROUGE-L to the oracle's answer ("oracle_rouge").

    Raises:
        UserError: a model has another vocabulary than the oracle.
    """
    *compared, oracle = models
    answered = {
        name: [said(row) for row in rows_of(rows[ORACLE], name, protocol.decodings[0])]
        for name in COMPARED
        if name in protocol.prompts
    }
    figures = []
    for model in compared:
        file = folder / f"{model.label}.json"
        key = sha256_of([model.identity, oracle.identity, [[vars(pair) for pair in own] for own in answered.values()]])
        known = read_json(file) if file.exists() else {}
        if known.get("key") != key:
            (reference, template), (own, its_template) = oracle.load(), model.load()
            if template.tokenizer.get_vocab() != its_template.tokenizer.get_vocab():
                raise UserError(f"{model.label} has another vocabulary than the oracle: give an oracle of its base")
            collator = Collator(template, "paper", context_length(reference.config))
            known = {
                "key": key,
                **{
                    name: answer_divergence(reference, own, collator, pairs, f"{model.label} and the oracle")
                    for name, pairs in answered.items()
                },
            }
            del reference, own
            write_file(file, json.dumps(known))
        for name in answered:
            kl, tokens = zip(*known[name], strict=True)
            figures.append(
                figure_of(model.label, name, None, "oracle_divergence", scoring.ratio(kl, tokens, protocol.seed))
            )
        for name, decoding in protocol.rounds:
            if name in answered:
                pairs = [*zip(*(rows_of(rows[one], name, decoding) for one in (model.label, ORACLE)), strict=True)]
                kinds = [(_kind(ours), _kind(theirs)) for ours, theirs in pairs]
                judged = [None not in both for both in kinds]
                same = [both[0] == both[1] and None not in both for both in kinds]
                rouge = [scoring.rouge_l(theirs["answer"], ours["answer"]) for ours, theirs in pairs]
                for metric, estimate in (
                    ("oracle_kind", scoring.ratio(same, judged, protocol.seed)),
                    ("oracle_rouge", scoring.mean(rouge, protocol.seed)),
                ):
                    figures.append(figure_of(model.label, name, decoding.name, metric, estimate))
    return figures


def _kind(row: dict) -> str | None:
    """What kind of answer it is: harmful, degenerate, refused or other; None if a judge could not say."""
    if row["verdict"] in ("harmful", "degenerate"):
        return row["verdict"]
    if row["verdict"] == "unjudged" or row["refused"] is None:
        return None
    return "refused" if row["refused"] else "other"
