"""BLEURT (Sellam et al. 2020): a learned similarity of an answer to a reference."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import BASE
from harmful_unlearn.evals.files.answers import write_answers
from harmful_unlearn.models import hub

# BLEURT's first release as a plain transformers model. bleurt-pytorch 0.0.1, which has the later BLEURT-20, does not
# import with transformers 5.
BLEURT = "Elron/bleurt-base-512"
BLEURT_BATCH = 32


@torch.inference_mode()
def bleurt_scores(references: list[str], answers: list[str], name: str, device: torch.device) -> list[float]:
    """BLEURT of each answer against its reference, by a sequence regression model of transformers.

    Raises:
        UserError: the model cannot be loaded, or does not give one number for each pair.
    """
    folder = hub.resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name} is not a BLEURT model of transformers ({error}): give one like {BLEURT}") from None
    if model.config.num_labels != 1:
        raise UserError(f"{name} has {model.config.num_labels} outputs, not one score: give a model like {BLEURT}")
    model.to(device).eval()
    scores: list[float] = []
    for start in tqdm(range(0, len(answers), BLEURT_BATCH), "BLEURT", unit="batch", leave=False):
        batch = slice(start, start + BLEURT_BATCH)
        rows = tokenizer(
            references[batch],
            answers[batch],
            padding=True,
            truncation=True,
            max_length=model.config.max_position_embeddings,
            return_tensors="pt",
        )
        scores += model(**rows.to(device)).logits[:, 0].float().tolist()
    return scores


def add_bleurt(rows: dict[str, list[dict]], name: str, folder: Path, device: torch.device) -> None:
    """Add to the answers to normal prompts their BLEURT against the reference and against the base's answer.

    Args:
        rows: of each model's answers file in `folder`, by label.
        name: of the BLEURT model.
    """
    base_answers = {(row["decoding"], row["index"]): row["answer"] for row in rows[BASE] if row["set"] == "normal"}
    for label, all_rows in rows.items():
        lacking = [row for row in all_rows if row["set"] == "normal" and row.get("bleurt_model") != name]
        if not lacking:
            continue
        answers = [row["answer"] for row in lacking]
        against_reference = bleurt_scores([row["reference"] for row in lacking], answers, name, device)
        from_base = [base_answers[row["decoding"], row["index"]] for row in lacking]
        against_base = bleurt_scores(from_base, answers, name, device)
        for row, to_reference, to_base in zip(lacking, against_reference, against_base, strict=True):
            row |= {"bleurt_model": name, "bleurt_reference": to_reference, "bleurt_base": to_base}
        write_answers(folder, label, all_rows)
