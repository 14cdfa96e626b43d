"""What `make` and conda install, and what the checkout holds."""

import re
import subprocess
import tomllib

import yaml

from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.storage.provenance import CODE_VERSION


def test_conda_and_pip_have_the_same_pins():
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
    environment = yaml.safe_load((ROOT / "llm_unlearn.yml").read_text())
    assert environment["name"] == "llm_unlearn"
    assert environment["dependencies"][-1]["pip"] == pins


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == CODE_VERSION


def test_top_level():
    for name in (
        "README.md",
        "llm_unlearn.yml",
        "task_vector.py",
        "main.py",
        "harmful_unlearn",
        "dataloader",
        "logs",
        "tests",
        "pyproject.toml",
        "requirements.txt",
        "Makefile",
        "LICENSE",
        ".ci/run",
    ):
        assert (ROOT / name).exists(), name


def test_modules_shadow_no_package():
    """The script's folder comes first on sys.path, so its modules hide packages of the same name."""
    ours = {path.stem for path in (ROOT / "harmful_unlearn").glob("*.py")}
    taken = {
        "datasets",
        "evaluate",
        "transformers",
        "accelerate",
        "peft",
        "tokenizers",
        "torch",
        "metrics",
        "tables",
        "utils",
    }
    assert not ours & taken


def test_make_names_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for target in ("demo", "reproduce-demo", "test", "test-slow", "fuzz", "data", "setup", "clean"):
        assert f"make {target}" in done.stdout
