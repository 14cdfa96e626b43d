"""The judges by name, as --judge takes them. Add a kind of judge here."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from harmful_unlearn.data.pku_saferlhf import Response
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.judges.base import Judge
from harmful_unlearn.evals.judges.classifier import Classifier
from harmful_unlearn.evals.judges.labelled import split_labelled
from harmful_unlearn.evals.judges.phrases import OPENINGS, PhraseJudge, read_phrases
from harmful_unlearn.storage.files import ROOT, user_path

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
        name: "classifier", "phrases:FILE", "finetuned:MODEL_ID_OR_FOLDER", "hf:MODEL_ID_OR_FOLDER" or "openai:MODEL".
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
    if kind == "phrases":
        return PhraseJudge(name, read_phrases(user_path(model)), opening=False)
    # The other judges import packages that these do not need.
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
    if not re.fullmatch("classifier|(phrases|finetuned|hf|openai):.+", text):
        kinds = "classifier, phrases:FILE, finetuned:MODEL_ID_OR_FOLDER, hf:MODEL_ID_OR_FOLDER or openai:MODEL"
        raise UserError(f'there is no judge "{text}": give {kinds}')
    return text


def make_refusal_judge(name: str, cache: Path, device: torch.device, batch_size: int = 8) -> Judge:
    """The judge of refusals of that name.

    Args:
        name: "phrases", "phrases:FILE", "hf:MODEL_ID_OR_FOLDER" or "openai:MODEL".
        cache, batch_size: as of `make_judge`.

    Raises:
        UserError: it lacks what it needs.
    """
    kind, _, model = refusal_judge_name(name).partition(":")
    if kind == "phrases":
        return PhraseJudge(name, read_phrases(user_path(model)) if model else OPENINGS, opening=True)
    if kind == "hf":
        from harmful_unlearn.evals.judges.hub import refusal_judge

        return refusal_judge(name, model, device, batch_size)
    from harmful_unlearn.evals.judges.server import REFUSAL, ServerJudge

    return ServerJudge(name, model, cache, REFUSAL)


def make_relevance_judge(
    name: str,
    *,
    base: EvaluatedModel,
    responses: list[Response],
    sets: Sequence[list[str]],
    seed: int,
    folder: Path,
    device: torch.device,
    batch_size: int = 8,
) -> Judge | None:
    """The judge of whether answers fit their questions of that name; None for "none".

    Args:
        name: "likelihood", "none", "hf:MODEL_ID_OR_FOLDER" or "openai:MODEL".
        base, responses, sets, seed: as of `LikelihoodJudge`.
        folder: for its threshold, or its verdicts.

    Raises:
        UserError: it lacks what it needs.
    """
    kind, _, model = relevance_judge_name(name).partition(":")
    if kind == "none":
        return None
    if kind == "likelihood":
        from harmful_unlearn.evals.judges.relevance import LikelihoodJudge

        return LikelihoodJudge(base, responses, sets, seed, folder / "relevance.json")
    if kind == "hf":
        from harmful_unlearn.evals.judges.hub import relevance_judge

        return relevance_judge(name, model, device, batch_size)
    from harmful_unlearn.evals.judges.server import RELEVANCE, ServerJudge

    return ServerJudge(name, model, folder / "relevance_judge.jsonl", RELEVANCE)


def relevance_judge_name(text: str) -> str:
    """A name as --relevance_judge takes it. Raises UserError where there is no such judge."""
    if not re.fullmatch("likelihood|none|(hf|openai):.+", text):
        raise UserError(f'there is no judge of relevance "{text}": give likelihood, none, hf:MODEL or openai:MODEL')
    return text


def refusal_judge_name(text: str) -> str:
    """A name as --refusal_judge takes it. Raises UserError where there is no such judge."""
    if not re.fullmatch("phrases|(phrases|hf|openai):.+", text):
        raise UserError(f'there is no judge of refusals "{text}": give phrases, phrases:FILE, hf:MODEL or openai:MODEL')
    return text
