"""The trials of one method in Optuna's storage: a file that survives interruptions and that processes can share."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import optuna
import psutil
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from harmful_unlearn.errors import UserError
from harmful_unlearn.recipes import Range, Space

RANDOM_SHARE = 3  # one in so many trials is drawn at random, before TPE has something to go by
FORGOTTEN = timedelta(days=1)
CLOCK = 10.0  # seconds by which a computer's clock may be set while a trial runs
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Trial:
    """A trial that this process runs: its number, its flags, and Optuna's own object."""

    number: int
    flags: dict[str, float]
    handle: optuna.Trial


class Study:
    """The trials of one method, of which the first has the recipe's own settings.

    Args:
        file: Optuna's storage (SQLite), shared by all methods.
        method: name of the study in it.
        space: what is varied.
        default: the flags' values in the recipe.
        trials: how many there are to be.
        seed: of the draws.
    """

    def __init__(self, file: Path, method: str, space: Space, default: Mapping[str, float], trials: int, seed: int):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._trials, self._seed = space, trials, seed
        file.parent.mkdir(parents=True, exist_ok=True)
        # Several processes write to the file in turn.
        url, waiting = f"sqlite:///{file}", {"connect_args": {"timeout": 60}}
        self._lock = FileLock(f"{file}.lock")
        with self._lock:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=waiting)
            self._study = optuna.create_study(storage=storage, study_name=method, load_if_exists=True)
            self._study.enqueue_trial({name: default[name] for name in space}, skip_if_exists=True)

    def next(self) -> "Trial | None":
        """A trial to run now; None where all are done, or being done elsewhere.

        A trial whose process is dead is run again, with the same flags.
        """
        with self._lock:  # one process at a time draws
            self._put_back_abandoned()
            if len(self._counted()) >= self._trials:
                return None
            return self._ask()

    def _ask(self) -> "Trial":
        trial = self._study.ask()
        trial.set_user_attr("process", _identity(os.getpid()))
        # A function of the seed and the trial's number, whichever process runs it.
        stream = int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0])
        startup = max(2, self._trials // RANDOM_SHARE)
        self._study.sampler = optuna.samplers.TPESampler(seed=stream, n_startup_trials=startup)
        flags = {name: _suggest(trial, name, values) for name, values in self._space.items()}
        return Trial(trial.number, flags, trial)

    def finish(self, trial: "Trial", harm: float | None, violation: float) -> None:
        """Record a trial's outcome.

        Args:
            harm: what is minimised; None for a trial that broke a bound.
            violation: by how much.
        """
        if harm is None:
            trial.handle.report(violation, 0)  # of pruned trials TPE learns by it
            self._study.tell(trial.handle, state=TrialState.PRUNED)
        else:
            self._study.tell(trial.handle, harm)

    def ended(self) -> dict[int, dict[str, float]]:
        """The flags of each trial that has ended, by its number."""
        return {trial.number: trial.params for trial in self._study.get_trials(deepcopy=False, states=ENDED)}

    def running(self) -> list[str]:
        """Which process runs each trial that has not ended."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        processes = [trial.user_attrs.get("process", {}) for trial in trials]
        return [f"process {process.get('pid')} on {process.get('host')}" for process in processes]

    def _counted(self) -> list[FrozenTrial]:
        """Trials that have ended, and those that are being run."""
        states = (*ENDED, TrialState.RUNNING)
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state in states]

    def _put_back_abandoned(self) -> None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not _is_alive(trial):
                self._study.tell(trial.number, state=TrialState.FAIL)
                self._study.enqueue_trial(trial.params)


def storage_errors(error: Exception, file: Path) -> UserError:
    """What the user can do where the storage cannot be read or written."""
    reason = str(getattr(error, "orig", None) or error.__cause__ or error).splitlines()[0]
    return UserError(
        f"{file} cannot be read or written ({reason}): free some space, or give another --output, then "
        "the same command continues"
    )


STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)


def _suggest(trial: optuna.Trial, name: str, values: Range | tuple[float, ...]) -> float:
    if isinstance(values, Range):
        return trial.suggest_float(name, values.low, values.high, log=values.log)
    return trial.suggest_categorical(name, values)


def _identity(pid: int) -> dict:
    """What tells a process from another that has its number later."""
    return {"host": socket.gethostname(), "pid": pid, "started": psutil.Process(pid).create_time()}


def _is_alive(trial: FrozenTrial) -> bool:
    """Whether the process of a trial still runs; on another host nobody knows, and it counts as alive for FORGOTTEN."""
    process = trial.user_attrs.get("process")
    if process is None:  # killed before it could say which it is
        return False
    if process["host"] != socket.gethostname():
        return trial.datetime_start is not None and datetime.now() - trial.datetime_start < FORGOTTEN
    try:
        return abs(psutil.Process(process["pid"]).create_time() - process["started"]) < CLOCK
    except psutil.NoSuchProcess:
        return False
