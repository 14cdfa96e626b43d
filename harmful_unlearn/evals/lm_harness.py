"""EleutherAI's lm-evaluation-harness on the evaluated models."""

import importlib.util
import json
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.models import hub
from harmful_unlearn.storage.files import write_file


def check_installed(args: Namespace) -> None:
    """Say now that what measures utility is missing. Raises UserError."""
    if args.bleurt:
        hub.resolve_model(args.bleurt)
    if getattr(args, "lm_eval", None) and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm_eval needs the lm-evaluation-harness: pip install lm_eval, or leave it out")


def lm_eval_figures(
    subjects: list[EvaluatedModel], tasks: list[str], folder: Path, device: torch.device, dispatch: bool = False
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
                figures.append(
                    {
                        "model": subject.label,
                        "set": f"lm_eval {task}",
                        "decoding": None,
                        "metric": metric,
                        "value": value,
                        "low": value - spread,
                        "high": value + spread,
                        "n": values["n"],
                    }
                )
    return figures
