"""Runs that are stopped and resumed: their flags, what they leave, and whether two runs are the same."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.running import runs

SCRIPT = ROOT / "harmful_unlearn" / "unlearn_harm_new.py"
STEPS = 6


def flags(model: Path, out: Path, *more: str) -> list[str]:
    return runs.flags(model, out, "--max_unlearn_steps", str(STEPS), "--log_file", str(out / "run.log"), *more)


def run(model: Path, out: Path, *more: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return exit_code(lambda: main(flags(model, out, *more)))


def metrics_of(out: Path) -> list[dict]:
    lines = (out / "run.metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    """The weights of both stages to the bit, and the metrics."""
    for stage in ("harmful", "unlearned"):
        files = [sorted(folder.glob("*.safetensors")) for folder in (ours / stage, theirs / stage)]
        assert [file.name for file in files[0]] == [file.name for file in files[1]] != []
        for one, other in zip(*map(lambda found: map(load_file, found), files), strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert metrics_of(ours) == metrics_of(theirs)
    assert not list(ours.glob(".*")) and not (ours / "harmful.checkpoints").exists()


def limited(size: int):
    """Files end at `size` bytes, as on a full disk but for the error's name."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def start(words: list[str], **more) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )
