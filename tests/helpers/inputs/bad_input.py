"""The commands, good words for each, and what a table of bad input (tests/commands/refusals/) has in a row."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import main as spot_check
import task_vector
from dataloader import fetch_truthfulqa
from harmful_unlearn import demo, evaluation, reproduce, unlearn_harm_new
from harmful_unlearn.cli.running import exit_code
from tests.helpers.inputs.bad_files import Maker

MAINS = {
    "unlearn": unlearn_harm_new.main, "vector": task_vector.main, "answers": spot_check.main,
    "evaluate": evaluation.main, "reproduce": reproduce.main, "demo": demo.main, "fetch": fetch_truthfulqa.main,
}  # fmt: skip
SCRIPTS = {
    "unlearn": "harmful_unlearn/unlearn_harm_new.py", "vector": "task_vector.py", "answers": "main.py",
    "evaluate": "harmful_unlearn/evaluation.py", "reproduce": "harmful_unlearn/reproduce.py",
    "demo": "harmful_unlearn/demo.py", "fetch": "dataloader/fetch_truthfulqa.py",
}  # fmt: skip
# Good commands; a row's words come after them. {base}, {tuned} and {adapter} are models, {here} has the files that the
# row makes, {out} is where the command would write.
DATA = "--harmful_dataset {goldens}/pku_saferlhf_current_schema.jsonl --normal_dataset {goldens}/TruthfulQA.csv "
GOOD = {
    "unlearn": "--model_name {base} --max_unlearn_steps 1 --model_save_dir {out}/harmful --log_file {out}/run.log "
               "--task_vector_saving_path {out}/unlearned " + DATA,
    "vector": "--base {base} ",
    "answers": "--base {base} --unlearned {out}/unlearned --harmful_model {tuned} ",
    "evaluate": "--model m={tuned} --base {base} --output {out} --n_seen 1 --n_unseen 0 --n_normal 0 "
                "--base_answers none ",
    "reproduce": "--model_name {base} --recipe demo --output {out} " + DATA,
    "demo": "--quick --output {out} ",
    "fetch": "--url http://127.0.0.1:9/none ",
}  # fmt: skip
TO = "--finetuned {tuned} --output {out}/model"


@dataclass
class Bad:
    """A row of a table of bad input.

    Attributes:
        command: a key of MAINS.
        words: of the command line, after the good ones.
        fix: a part of the error message.
        make: makes files that the command needs, in `here`.
        stub: a function, by its dotted name, that raises an error in place of its work.
        skip: whether this cannot be tested on this machine.
    """

    command: str
    words: str | list[str]
    fix: str
    make: Maker | None = None
    stub: tuple[str, Exception] | None = None
    skip: bool = False


def words_of(bad: Bad, at: SimpleNamespace) -> list[str]:
    """The command line of a row, with the folders in `at`."""
    words = bad.words.split() if isinstance(bad.words, str) else bad.words
    return [word.format(**vars(at)) for word in [*GOOD[bad.command].split(), *words]]


def run_good(command: str, words: str, at: SimpleNamespace) -> int:
    """The exit code of a command after its good words and these."""
    return exit_code(lambda: MAINS[command](words_of(Bad(command, words, ""), at)))


def listing(*folders: Path) -> set:
    """Everything in these folders: path, size, time of the last change."""
    walks = [walk for folder in folders for walk in os.walk(folder)]
    stats = {path: path.lstat() for top, _, names in walks for path in (Path(top) / name for name in names)}
    return {Path(top) for top, _, _ in walks} | {(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def check_refusal(code: int, output: str, fix: str) -> None:
    """Exit code 2 and one line of error, the last one, that names the fix."""
    errors = [line for line in output.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1, output
    assert fix in errors[0], output
    assert output.endswith(errors[0] + "\n"), output
    assert "Traceback" not in output and "usage:" not in output, output
