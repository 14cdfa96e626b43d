"""The judges by name, as --judge takes them. Add a kind of judge here."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.judges.classifier import Classifier
from harmful_unlearn.evals.judges.labelled import split_labelled
from harmful_unlearn.storage.files import ROOT

LEARN_FROM_LABELS = ("classifier", "finetuned")  # judges that are trained on the harmful data


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
    more_normal: Sequence[Pair] = (),
    home: Path = ROOT / "logs" / "judges",
) -> Judge:
    """The judge of that name.

    Args:
        name: "classifier", "finetuned:MODEL_ID_OR_FOLDER", "hf:MODEL_ID_OR_FOLDER" or "openai:MODEL".
        responses: all labelled responses of the harmful data.
        normal: the normal texts that stage 1 may train on, safe ones.
        judged: questions whose answers will be judged; no judge is trained on them.
        cache: a .jsonl file for the verdicts of openai:.
        batch_size: of hf: and finetuned: models.
        more_normal: all other normal texts. finetuned: learns from these, too, so that it is the same for every seed.
        home: where fine-tuned judges are kept.

    Raises:
        UserError: there is no such judge, or it lacks what it needs.
    """
    kind, _, model = judge_name(name).partition(":")
    if kind == "classifier":
        return Classifier(split_labelled(responses, normal, judged, seed))
    # The other judges import packages that the classifier does not need.
    if kind == "finetuned":
        from harmful_unlearn.evals.judges.finetuned import FinetunedJudge

        return FinetunedJudge(name, model, responses, [*normal, *more_normal], home, device, batch_size)
    if kind == "hf":
        from harmful_unlearn.evals.judges.hub import hub_judge

        return hub_judge(name, model, device, batch_size)
    from harmful_unlearn.evals.judges.server import ServerJudge

    return ServerJudge(name, model, cache)


def judge_name(text: str) -> str:
    """A judge's name, as --judge takes it. Raises UserError where there is no such judge."""
    if not re.fullmatch("classifier|(finetuned|hf|openai):.+", text):
        kinds = "classifier, finetuned:MODEL_ID_OR_FOLDER, hf:MODEL_ID_OR_FOLDER or openai:MODEL"
        raise UserError(f'there is no judge "{text}": give {kinds}')
    return text
