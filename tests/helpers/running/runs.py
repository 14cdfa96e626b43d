"""Runs of the script on a tiny model and the goldens' data: its flags, and what it leaves."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.training.setup import Stage1, prepare_stage_1
from harmful_unlearn.unlearn_harm_new import MODELS, OTHER_MODELS
from tests.helpers.models.tiny import GOLDENS

DATA = [
    "--harmful_dataset",
    str(GOLDENS / "pku_saferlhf_current_schema.jsonl"),
    "--normal_dataset",
    str(GOLDENS / "TruthfulQA.csv"),
]


def flags(model: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model_name",
        str(model),
        *DATA,
        "--max_unlearn_steps",
        "3",
        "--lr",
        "1e-3",
        "--precision",
        "fp32",
        "--model_save_dir",
        str(out / "harmful"),
        "--task_vector_saving_path",
        str(out / "unlearned"),
        "--log_file",
        str(out / "logs" / "run.log"),
        *more,
    ]


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "logs" / "run.metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def prepared(model: Path, out: Path, *more: str) -> Stage1:
    """Stage 1 of such a run, before its weights are loaded."""
    return prepare_stage_1(parse_flags(flags(model, out, *more)), model, MODELS, OTHER_MODELS)
