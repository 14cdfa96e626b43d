"""EleutherAI's lm-evaluation-harness on the evaluated models."""

import hashlib
import importlib.util
import json
import re
import tempfile
from pathlib import Path

import torch

from harmful_unlearn.errors import UserError, first_line
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.storage.files import user_path, write_file


def check_usable(tasks: list[str]) -> None:
    """Raises UserError: the package lm_eval is missing, or a task's file, or its name in it."""
    for task in tasks:
        if task.endswith(".yaml"):
            _task_in(user_path(task))
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm_eval needs the lm-evaluation-harness: pip install lm_eval, or omit the flag")


def lm_eval_figures(
    models: list[EvaluatedModel],
    tasks: list[str],
    folder: Path,
    device: torch.device,
    limit: int | None = None,
    dispatch: bool = False,
) -> list[dict]:
    """Figures of EleutherAI's lm-evaluation-harness for these models, kept in lm_eval.json.

    Args:
        tasks: the harness's names, or .yaml files of tasks of one's own.
        limit: only so many samples of each task.
        dispatch: let the harness place a model over devices, CPU and disk, by its own device_map ("auto").

    Returns:
        Figures as `metrics.figures` gives them; the interval is the value +- 1.96 standard errors.

    Raises:
        UserError: the harness does not know a task or cannot load its data.
    """
    file = folder / "lm_eval.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    figures = []
    for model in models:
        key = json.dumps([model.identity, *map(_content, tasks), *([limit] if limit else [])], sort_keys=True)
        if key not in results:
            results[key] = _run(model, tasks, device, limit, dispatch)
            write_file(file, json.dumps(results, indent=2, default=str) + "\n")
        for task, values in results[key].items():
            figures += _figures_of(model.label, task, values)
    return figures


def _run(
    model: EvaluatedModel, tasks: list[str], device: torch.device, limit: int | None, dispatch: bool
) -> dict[str, dict]:
    """The harness's results by task, each with the number of its samples, "n"."""
    import lm_eval  # not one of the project's requirements
    from lm_eval.tasks import TaskManager

    arguments: dict = {"pretrained": str(model.folder)}
    files = {task: user_path(task) for task in tasks if task.endswith(".yaml")}
    try:
        names = [_task_in(files[task]) if task in files else task for task in tasks]
        manager = TaskManager(include_path=sorted({str(file.parent) for file in files.values()}) or None)
        with tempfile.TemporaryDirectory(prefix="offload-") as scratch:
            if dispatch:
                arguments |= {"parallelize": True, "offload_folder": scratch}
            run = lm_eval.simple_evaluate(
                "hf", model_args=arguments, tasks=names, device=str(device), task_manager=manager, limit=limit
            )
    except Exception as error:  # its tasks raise anything
        raise UserError(
            f"lm_eval failed on {', '.join(tasks)} ({first_line(error)}): check the tasks' names and its installation"
        ) from error
    samples = run["n-samples"]
    return {task: {**values, "n": samples[task]["effective"]} for task, values in run["results"].items()}


def _content(task: str) -> str:
    """The task's name; with a hash of its file, if it is one."""
    if not task.endswith(".yaml"):
        return task
    return f"{task} {hashlib.sha256(user_path(task).read_bytes()).hexdigest()}"


def _task_in(file: Path) -> str:
    """The name of the task in a .yaml file. Raises UserError: it cannot be read, or does not say."""
    try:
        named = re.search(r"^task:\s*(\S+)\s*$", file.read_text(encoding="utf-8"), re.M)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): give a task's name or its .yaml file") from None
    if not named:
        raise UserError(f'{file} has no line "task: NAME": add it, as the harness needs it')
    return named[1].strip("'\"")


def _figures_of(label: str, task: str, values: dict) -> list[dict]:
    figures = []
    for name, value in values.items():
        metric, _, filter_name = name.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        spread = 1.96 * error if isinstance(error, int | float) else 0.0
        figure = {"model": label, "set": f"lm_eval {task}", "decoding": None, "metric": metric}
        figures.append({**figure, "value": value, "low": value - spread, "high": value + spread, "n": values["n"]})
    return figures
