"""The script with --resume, killed at random moments until that has happened often enough (test_interruptions.py).

Each run is a fork of this process, which has only imported it: the start of Python is not waited for again and again.
Prints where the kills fell; finished runs are moved to OUT-1, OUT-2, ...
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.unlearn_harm_new import main


def start(flags: list[str]) -> int:
    process = os.fork()
    if process == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os._exit(exit_code(lambda: main(flags)))
    return process


def ended(process: int, seconds: float) -> int | None:
    """Wait so long at most; the exit code if it has ended by then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def where(out: Path) -> str:
    """What a killed run was doing, by what it left."""
    hidden = [path.name for path in out.rglob(".*.partial-*")]
    if any(name.startswith(".unlearned") for name in hidden):
        return "negation"
    if any(name.startswith(".harmful") for name in hidden):
        return "saving"
    if any(name.startswith(".step-") for name in hidden):
        return "checkpointing"
    return "between the stages" if (out / "harmful").exists() else "training or before"


def check(out: Path) -> None:
    """No half-written folder has the name of a whole one."""
    for folder in (out / "harmful", out / "unlearned", *(out / "harmful.checkpoints").glob("step-*")):
        assert not folder.exists() or (folder / "run.json").exists(), folder


if __name__ == "__main__":
    wanted, out, flags = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    rng, kills, finished = random.Random(0), {}, 0
    started = time.monotonic()
    assert ended(start(flags), 600) == 0
    usual = time.monotonic() - started
    while True:
        if (out / "unlearned").exists():
            finished += 1
            out.rename(f"{out}-{finished}")
        if sum(kills.values()) == wanted:
            break
        process = start(flags)
        code = ended(process, usual * rng.random())
        if code is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            place = where(out)
            kills[place] = kills.get(place, 0) + 1
        else:
            assert code == 0, code
        check(out)
    while not (out / "unlearned").exists():
        assert ended(start(flags), 600) == 0
    finished += 1
    out.rename(f"{out}-{finished}")
    print(json.dumps({"kills": kills, "finished": finished}))
