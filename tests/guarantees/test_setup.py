"""What `make` and conda install, what the checkout holds, and what its scripts run."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import main
from harmful_unlearn import demo, reproduce
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.storage.provenance import CODE_VERSION

PACKAGE = ROOT / "harmful_unlearn"
# Imported only where a flag asks for it, and the message then says what to install; or where check_clients.py finds it.
OPTIONAL = {"bitsandbytes", "deepspeed", "llama_cpp", "lm_eval", "mergekit", "tensorboard", "trl", "vllm", "wandb"}
IMPORT_NAMES = {
    "scikit-learn": "sklearn",
    "PyYAML": "yaml",
    "Jinja2": "jinja2",
    "Markdown": "markdown",
    "SQLAlchemy": "sqlalchemy",
}
# Not run by this project, or not installed here, and yet not to be hidden.
OTHER_LIBRARIES = {"evaluate", "metrics", "tables", "utils", "mergekit", "scipy", "bleurt_pytorch"}


def pins() -> dict[str, str]:
    """The packages of requirements.txt, and their versions."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
    versions = dict(line.split("==") for line in lines)
    assert len(versions) == len(lines)
    return versions


def test_conda_and_pip_have_the_same_pins():
    environment = yaml.safe_load((ROOT / "llm_unlearn.yml").read_text())
    assert environment["name"] == "llm_unlearn"
    assert environment["dependencies"][-1]["pip"] == [f"{name}=={version}" for name, version in pins().items()]


def test_every_import_is_pinned():
    pinned = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in pins()}
    folders = ["harmful_unlearn", "tests", "benchmarks", "dataloader", "scripts"]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    imported = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
    own = set(folders) | {path.stem for path in ROOT.glob("*.py")}
    assert imported - own - OPTIONAL - pinned == set()


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == CODE_VERSION


def test_top_level():
    files = "README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE Makefile pyproject.toml requirements.txt"
    commands = "llm_unlearn.yml task_vector.py main.py .ci/run .github/workflows/test.yml"
    folders = "scripts/reproduce_demo.sh scripts/laptop.sh harmful_unlearn docs dataloader logs tests benchmarks"
    for name in f"{files} {commands} {folders}".split():
        assert (ROOT / name).exists(), name


def test_modules_shadow_no_package():
    """A command's folder or the repository comes first on sys.path: what is there hides a library of the same name."""
    modules = {path.stem for folder in (ROOT, PACKAGE) for path in folder.glob("*.py")}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    ours = {name for name in modules | folders if not name.startswith("__")}
    assert {"data", "models", "losses", "evaluation", "task_vector"} <= ours
    libraries = set(packages_distributions()) | set(sys.stdlib_module_names) | OTHER_LIBRARIES | OPTIONAL
    assert ours & libraries == set()


def targets() -> list[str]:
    """The targets of the Makefile."""
    lines = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return " ".join(lines).split()


def made(*arguments: str) -> str:
    """What `make` prints."""
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_names_every_target():
    assert {"demo", "reproduce-demo", "lint", "test", "test-slow", "fuzz", "data", "setup", "clean"} < set(targets())
    described = re.findall(r"^make ([a-z-]+)  +\S", made("help"), re.MULTILINE)
    assert sorted(described) == sorted(set(targets()) - {"help"})


def test_make_test_lints_first():
    printed = made("--dry-run", "test")
    steps = [printed.index(step) for step in ("ruff check", "ruff format --check", "-m mypy", "-m pytest")]
    assert steps == sorted(steps)


def test_every_file_that_make_names_exists():
    printed = "".join(made("--dry-run", target) for target in targets() if target not in ("help", "clean"))
    patterns = set(re.findall(r"(?<![\w./])(?:[\w-]+/)+[\w*-]+\.(?:py|sh)\b", printed))
    assert len(patterns) > 3
    assert [pattern for pattern in patterns if not list(ROOT.glob(pattern))] == []


def test_workflow_runs_make_test_on_every_python():
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"] == [lowest, "3.12", "3.13"]
    assert all(re.fullmatch(r"[\w/-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


PARSERS = {"harmful_unlearn/demo.py": demo.parse_flags, "harmful_unlearn/reproduce.py": reproduce.parse_flags}


@pytest.fixture
def dry_run(tmp_path):
    """`dry_run("x.sh", flags, variables)`: a script with a Python that only prints, and the words of its commands."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf \'%q \' "$OMP_NUM_THREADS" "$@"\necho\n')
    python.chmod(0o755)
    (tmp_path / "scripts").mkdir()

    def run(name, more=(), **variables):
        script = Path(shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts"))
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "", **variables}
        done = subprocess.run([script, *more], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in done.stdout.splitlines()]

    return run


def test_the_comparison_on_the_demo_runs_commands_that_exist(dry_run, tmp_path):
    """Its commands are read by their own parsers."""
    commands = dry_run("reproduce_demo.sh", ["--harm_category", "Drugs, Weapons", "--seeds", "7"])
    parsed = [(command, PARSERS[command](flags)) for _, command, *flags in commands]
    assert [Path(command).stem for command, _ in parsed] == ["demo", "reproduce", "demo"] * 2
    assert [threads for threads, *_ in commands] == ["", "1", ""] * 2
    first, second = (flags for command, flags in parsed if "reproduce" in command)
    assert first.seeds == [7] and first.harm_category[-1] == "Drugs, Weapons" and len(first.harm_category) == 4
    assert second.recipe == "demo-no-refusals" and second.harm_category == ["Drugs, Weapons"]
    (tmp_path / ".venv/bin/python").write_text("#!/usr/bin/env bash\nexit 3\n")
    assert subprocess.run([tmp_path / "scripts" / "reproduce_demo.sh"]).returncode == 3


def test_the_laptop_run_takes_the_hubs_model_and_data_or_your_own(dry_run):
    fetch, compare, spot_check = dry_run("laptop.sh")
    assert fetch[1] == "dataloader/fetch_truthfulqa.py"
    settings = reproduce.parse_flags(compare[2:])
    assert settings.model_name == settings.recipe == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert settings.harmful_dataset == "PKU-Alignment/PKU-SafeRLHF" and settings.unseen_split == "test"
    shown = main.parse_flags(spot_check[2:])
    assert settings.runs == ["ga_mismatch"]
    assert shown.unlearned[0].parts[-4:] == ("laptop", "seed-8888", "ga_mismatch", "unlearned")
    own = {"LAPTOP_MODEL": "m", "LAPTOP_DATA": "h.jsonl", "LAPTOP_NORMAL": "n.csv", "LAPTOP_OUTPUT": "a b"}
    compare, spot_check = dry_run("laptop.sh", ["--n_unseen", "7"], **own, LAPTOP_RUN="sku")
    settings = reproduce.parse_flags(compare[2:])
    assert (settings.model_name, settings.harmful_dataset, settings.normal_dataset) == ("m", "h.jsonl", "n.csv")
    assert settings.unseen_dataset is settings.unseen_split is None and settings.n_unseen == 7
    assert main.parse_flags(spot_check[2:]).unlearned[0].parts[-4:] == ("a b", "seed-8888", "sku", "unlearned")
    compare, _ = dry_run("laptop.sh", **own, LAPTOP_UNSEEN="u.jsonl")
    assert reproduce.parse_flags(compare[2:]).unseen_dataset == "u.jsonl"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_stop_at_the_first_failure(script):
    assert "\nset -euo pipefail\n" in script.read_text() and script.stat().st_mode & 0o111
