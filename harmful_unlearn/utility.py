"""Optional measures of utility by other packages: BLEURT, and the lm-evaluation-harness."""

import importlib.util
import json
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from harmful_unlearn import models
from harmful_unlearn.errors import UserError
from harmful_unlearn.measuring import BASE, Subject, write_answers
from harmful_unlearn.saving import write_file

# The released BLEURT checkpoints as plain transformers models; bleurt-pytorch 0.0.1, which has the later
# BLEURT-20, does not import with transformers 5.
BLEURT = "Elron/bleurt-base-512"
BLEURT_BATCH = 32


def check_there(args: Namespace) -> None:
    """Say now that what measures utility is missing. Raises UserError."""
    if args.bleurt:
        models.locate(args.bleurt)
    if getattr(args, "lm_eval", None) and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm_eval needs the lm-evaluation-harness: pip install lm_eval, or leave it out")


@torch.inference_mode()
def bleurt_scores(references: list[str], answers: list[str], name: str, device: torch.device) -> list[float]:
    """BLEURT of each answer against its reference, by a sequence regression model of transformers.

    Raises:
        UserError: the model cannot be had, or does not give one number a pair.
    """
    folder = models.locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name} is no BLEURT model of transformers ({error}): give one like {BLEURT}") from None
    if model.config.num_labels != 1:
        raise UserError(f"{name} has {model.config.num_labels} outputs, not one score: give a model like {BLEURT}")
    model.to(device).eval()
    scores = []
    for start in tqdm(range(0, len(answers), BLEURT_BATCH), "BLEURT", unit="batch", leave=False):
        chosen = slice(start, start + BLEURT_BATCH)
        rows = tokenizer(
            references[chosen], answers[chosen], padding=True, truncation=True,
            max_length=model.config.max_position_embeddings, return_tensors="pt",
        )  # fmt: skip
        scores += model(**rows.to(device)).logits[:, 0].float().tolist()
    return scores


def add_bleurt(rows: dict[str, list[dict]], name: str, folder: Path, device: torch.device) -> None:
    """Give the answers to normal prompts their BLEURT against the reference and against the base's answer."""
    base = {(row["decoding"], row["index"]): row["answer"] for row in rows[BASE] if row["set"] == "normal"}
    for label, found in rows.items():
        lacking = [row for row in found if row["set"] == "normal" and row.get("bleurt_model") != name]
        if not lacking:
            continue
        answers = [row["answer"] for row in lacking]
        theirs = [base[row["decoding"], row["index"]] for row in lacking]
        against_reference = bleurt_scores([row["reference"] for row in lacking], answers, name, device)
        against_base = bleurt_scores(theirs, answers, name, device)
        for row, one, other in zip(lacking, against_reference, against_base, strict=True):
            row |= {"bleurt_model": name, "bleurt_reference": one, "bleurt_base": other}
        write_answers(folder, label, found)


def lm_eval_figures(
    subjects: list[Subject], tasks: list[str], folder: Path, device: torch.device, dispatch: bool = False
) -> list[dict]:
    """Figures of EleutherAI's lm-evaluation-harness for these models, kept in lm_eval.json.

    Args:
        dispatch: let the harness place a model over devices, CPU and disk, by a device_map of its own ("auto").

    Its interval is value +- 1.96 of its standard errors.

    Raises:
        UserError: the harness does not know a task or cannot get its data.
    """
    import lm_eval

    file = folder / "lm_eval.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    figures = []
    for subject in subjects:
        key = json.dumps([subject.identity, *tasks], sort_keys=True)
        if key not in kept:
            model = {"pretrained": str(subject.folder)}
            try:
                with tempfile.TemporaryDirectory(prefix="offload-") as scratch:
                    if dispatch:
                        model |= {"parallelize": True, "offload_folder": scratch}
                    run = lm_eval.simple_evaluate("hf", model_args=model, tasks=tasks, device=str(device))
            except Exception as error:  # its tasks raise anything
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(
                    f"lm_eval failed on {', '.join(tasks)} ({reason}): check the tasks' names and its installation"
                ) from error
            n = run["n-samples"]
            kept[key] = {task: {**values, "n": n[task]["effective"]} for task, values in run["results"].items()}
            write_file(file, json.dumps(kept, indent=2, default=str) + "\n")
        for task, values in kept[key].items():
            for name, value in values.items():
                metric, _, filtered = name.partition(",")
                if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = values.get(f"{metric}_stderr,{filtered}")
                spread = 1.96 * error if isinstance(error, int | float) else 0.0
                figures.append({
                    "model": subject.label, "set": f"lm_eval {task}", "decoding": None, "metric": metric,
                    "value": value, "low": value - spread, "high": value + spread, "n": values["n"],
                })  # fmt: skip
    return figures
