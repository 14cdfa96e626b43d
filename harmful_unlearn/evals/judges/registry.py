"""The judges by name, as --judge takes them. Add a kind of judge here."""

import re
from pathlib import Path

import torch

from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.judges.classifier import Classifier


def make_judge(
    name: str,
    *,
    responses: list[Response],
    normal: list[Pair],
    judged: set[str],
    seed: int,
    cache: Path,
    device: torch.device,
    batch_size: int = 8,
) -> Judge:
    """The judge of that name.

    Args:
        name: "classifier", "hf:MODEL_ID_OR_FOLDER" or "openai:MODEL".
        responses: all labelled responses of the harmful data.
        normal: normal texts, safe ones.
        judged: questions whose answers will be judged; the classifier is not trained on them.
        cache: a .jsonl file for the verdicts of openai:.
        batch_size: of hf: models.

    Raises:
        UserError: there is no such judge, or it lacks what it needs.
    """
    kind, _, model = judge_name(name).partition(":")
    if kind == "classifier":
        return Classifier(responses, normal, judged, seed)
    # The other judges import packages that the classifier does not need.
    if kind == "hf":
        from harmful_unlearn.evals.judges.hub import hub_judge

        return hub_judge(name, model, device, batch_size)
    from harmful_unlearn.evals.judges.server import ServerJudge

    return ServerJudge(name, model, cache)


def judge_name(text: str) -> str:
    """A judge's name, as --judge takes it. Raises UserError where there is no such judge."""
    if not re.fullmatch("classifier|(hf|openai):.+", text):
        raise UserError(f'there is no judge "{text}": give classifier, hf:MODEL_ID_OR_FOLDER or openai:MODEL')
    return text
