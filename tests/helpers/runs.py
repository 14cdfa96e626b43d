"""Runs of the script on a tiny model and the goldens' data: its flags, and what it leaves."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.tiny import GOLDENS

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
