"""The trainings of a comparison: runs of unlearn_harm_new.py that are planned, done once, and checked."""

import gc
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.errors import Diverged, NoSafeAnswers, Stopped, UserError
from harmful_unlearn.evals.comparison.seed_evaluation import TrainedModel
from harmful_unlearn.models.loading import load_config, load_tokenizer
from harmful_unlearn.storage.files import write_file
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.training.checkpointing import TrainingCheckpoints
from harmful_unlearn.training.flags import TrainingSettings
from harmful_unlearn.training.flags import parse_flags as training_flags
from harmful_unlearn.training.resume import FREE_FLAGS

# Flags of unlearn_harm_new.py that may have changed since a model was trained.
IGNORED_FLAGS = FREE_FLAGS - {"gradient_checkpointing", "device_map"} | {"template", "system_prompt"}


def plan(
    folder: Path, base: Path, flags: Mapping[str, object], more_words: Sequence[str] = ()
) -> tuple[TrainedModel, list[str]]:
    """A model to train, or that is there already, and the words of its command.

    Args:
        folder: gets the model.
        base: the folder of the base model.
        flags: of unlearn_harm_new.py, but for those that name folders.
        more_words: the same, as a command line has them.

    Raises:
        UserError: another model is there, or a checkpoint of another.
    """
    words = [*as_words(flags), *more_words]
    model = TrainedModel(folder, f"python harmful_unlearn/unlearn_harm_new.py {shlex.join(words)}")
    words += as_words({"model_save_dir": model.finetuned, "task_vector_saving_path": model.unlearned})
    words += ["--log_file", str(folder / "run.log"), "--overwrite"]
    is_trained = (model.finetuned / "run.json").is_file()
    if there := model.finetuned if is_trained else TrainingCheckpoints(model.finetuned, keep=1).newest():
        check_same_flags(model.folder, RunRecord.read(there), training_flags(words), base)
        words += ["--stage", "negate"] if is_trained else ["--resume"]
    return model, words


def train(model: TrainedModel, words: list[str]) -> TrainedModel:
    """Run unlearn_harm_new.py with these words, as far as its models are not there yet.

    A run whose losses stop being finite, or whose data lack safe answers, has failed: that is noted in its folder, and
    it is not tried again.

    Raises:
        UserError: training cannot start.
        Stopped: Ctrl-C or SIGTERM; the next call continues from the last checkpoint, or with stage 2.
    """
    failure = model.folder / "failed.txt"
    if failure.exists() and not failure.read_text(encoding="utf-8").endswith(f"{model.command}\n"):
        failure.unlink()  # the recipe has changed since
    if not failure.exists() and not (model.unlearned / "run.json").is_file():
        print(f"\n$ {model.command}", flush=True)
        try:
            unlearn_harm_new.main(words)
        except (Diverged, NoSafeAnswers) as error:
            write_file(failure, f"not trained: {error}\n{model.command}\n")
        except Stopped as stop:
            raise Stopped(
                stop.number, f"stopped in the training of {model.folder}: the same command continues it"
            ) from None
        gc.collect()  # the model and its optimizer refer to each other; the next training needs their memory
        torch.cuda.empty_cache()
    if failure.exists():
        model = replace(model, failure=failure.read_text(encoding="utf-8").splitlines()[0])
        print(f"{model.folder.name}: {model.failure}")
    return model


def as_words(flags: Mapping[str, object]) -> list[str]:
    """Flags as a command line has them."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def check_same_flags(folder: Path, record: RunRecord, wanted: TrainingSettings, base: Path) -> None:
    """Raises UserError: the model was trained with other flags. The template is compared by what it resolves to."""
    had = {**training_flags([]).to_json(), **record.flags}
    for name, value in wanted.to_json().items():
        if name not in IGNORED_FLAGS and value != had.get(name):
            raise UserError(
                f"{folder} was trained with --{name} {had.get(name)}, and the recipe has {value} now: "
                "remove that folder, or give another --output"
            )
    template = wanted.template_choice.of(load_tokenizer(base, load_config(base)))
    if record.prompt_template not in (None, template.text):
        raise UserError(
            f"{folder} was trained in the template {record.prompt_template!r}, and the flags say "
            f"{template.text!r}: give its --template and --system_prompt, or another --output"
        )
