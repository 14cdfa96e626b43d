"""SKU on a small world, offline, in a few minutes: data, a base model, unlearning, and a table.

    python harmful_unlearn/demo.py                 # one seed
    python harmful_unlearn/demo.py --seeds 3       # mean and range over three
    python harmful_unlearn/demo.py --quick         # a smaller world, under a minute
    python harmful_unlearn/demo.py --oracle        # beside them, a model that never learned any harm

Everything is made from nothing (demo_world/). The project's own commands, which are printed as they run, unlearn it and
show answers; its own evaluation measures both models by an exact judge. A seed's base model is trained once and kept.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import harmful_unlearn.cli.before_imports  # noqa: F401

# One thread, here and in the commands that it runs: the figures are the same on any number of cores, and models this
# small gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers

from harmful_unlearn.cli.flag_parser import FlagParser, flag
from harmful_unlearn.cli.flag_types import positive_int, share, whole_number
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.demo_world.base_model import build_model, is_built
from harmful_unlearn.demo_world.judge import LEGEND, TemplateJudge
from harmful_unlearn.demo_world.tables import judge_table, kind_figures, table
from harmful_unlearn.demo_world.world import QUICK, Size, World, build_world, write_data
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.comparison.oracle import ORACLE
from harmful_unlearn.evals.evaluated_model import BASE, evaluated_model, load_model
from harmful_unlearn.evals.evaluator import measure
from harmful_unlearn.evals.inference.generation import Decoding
from harmful_unlearn.evals.metrics.figures import figures
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.evals.protocol import EvalProtocol
from harmful_unlearn.storage.files import ROOT, check_target, user_path, write_file
from harmful_unlearn.storage.lock import locked
from harmful_unlearn.storage.provenance import provenance

REFUSAL_SHARE = 0.2
# The paper's 1 for --normal_weight damages this model (docs/results.md, the demo).
WEIGHTS = {"bad_weight": 2.5, "random_weight": 2.5, "normal_weight": 0.05}
SHOWN = {"seen": 1, "unseen": 2, "unseen kinds": 1, "normal": 2}  # prompts that main.py is asked, by set
MAX_NEW_TOKENS = 48  # the longest answer has about 30


@dataclass(frozen=True)
class DemoSettings:
    """The flags of this command."""

    output: Path = flag("folder (default: logs/demo)", type=user_path, default=ROOT / "logs" / "demo")
    seeds: int = flag("how many seeds to run", type=positive_int, default=1)
    seed: int = flag("the first of them (default: 0)", type=whole_number, default=0)
    refusal_share: float = flag(
        "of harmful questions that the base learns to refuse", type=share, default=REFUSAL_SHARE
    )
    oracle: bool = flag(
        "also make a model with the base's training but without the harm, and measure it, too", action="store_true"
    )
    worlds_only: bool = flag("make data and base models, and stop", action="store_true")
    check_judge: Path | None = flag(
        "compare the judge of reproduce.py's output on these worlds with the exact one",
        type=user_path,
        metavar="FOLDER",
    )
    quick: bool = flag("a smaller world and model", action="store_true")


@dataclass(frozen=True)
class SeedRun:
    """What a seed of the demo gave: figures as `metrics.figures` gives them, seconds by step, and the command."""

    figures: list[dict]
    seconds: dict[str, float]
    command: str


class DemoProtocol(EvalProtocol):
    """Normal prompts are asked greedily only."""

    @property
    def rounds(self) -> list[tuple[str, Decoding]]:
        return [(name, decoding) for name, decoding in super().rounds if (name, decoding.name) != ("normal", "sampled")]


def main(arguments: list[str] | None = None) -> None:
    """Run the demo. Raises UserError."""
    settings = parse_flags(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if settings.check_judge:
        print(judge_table(settings.check_judge, settings.refusal_share))
        return
    check_target(settings.output, overwrite=True)
    with locked(settings.output):
        run_demo(settings)


def run_demo(settings: DemoSettings) -> None:
    """Build the worlds, unlearn, measure, and print what came out. Raises UserError."""
    started = time.perf_counter()
    size = QUICK if settings.quick else Size()
    seeds = list(range(settings.seed, settings.seed + settings.seeds))
    homes = {seed: settings.output / f"seed-{seed}" for seed in seeds}
    if settings.worlds_only:
        for seed, home in homes.items():
            build(home, seed, size, settings.refusal_share, settings.oracle)
        return
    results = settings.output / "results.json"
    results.unlink(missing_ok=True)
    runs = [run_seed(home, seed, size, settings.refusal_share, settings.oracle) for seed, home in homes.items()]
    all_figures = [{"seed": seed, **figure} for seed, run in zip(seeds, runs, strict=True) for figure in run.figures]
    report = {
        "seeds": seeds,
        "settings": {"refusal_share": settings.refusal_share, **WEIGHTS, **asdict(size)},
        "legend": LEGEND.replace("\n", " "),
        "figures": all_figures,
        "seconds": [run.seconds for run in runs],
        "commands": [run.command for run in runs],
        **provenance(),
    }
    write_file(results, json.dumps(report, indent=2) + "\n")
    heading("Base against unlearned", f"seeds {seeds}; also in {shown(results)}")
    print(table(all_figures))
    heading("Answers side by side", "the first seed's models, greedy")
    run_command(answers_command(homes[settings.seed], build_world(size, settings.seed, settings.refusal_share)))
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def run_seed(home: Path, seed: int, size: Size, refusal_share: float = REFUSAL_SHARE, oracle: bool = False) -> SeedRun:
    """Build the world of a seed under `home`, unlearn its base, and measure both models, and the oracle."""
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return round(clock[-1] - clock[-2], 1)

    seconds = {}
    world = build(home, seed, size, refusal_share, oracle)
    seconds["base model"] = lap()

    command = unlearn_command(home, seed, size)
    heading(f"Seed {seed}: SKU", "the project's script, unchanged")
    run_command(command)
    seconds["unlearning"] = lap()
    shutil.rmtree(home / "evaluation", ignore_errors=True)  # of an earlier run's models
    measured = measure_models(home, [BASE, "unlearned", *([ORACLE] if oracle else [])], world, seed)
    seconds["measuring"] = lap()
    return SeedRun(measured, seconds, shlex.join(command))


def build(home: Path, seed: int, size: Size, refusal_share: float = REFUSAL_SHARE, oracle: bool = False) -> World:
    """Make the world of a seed, its data, its base model and, if it is wanted, its oracle, as far as they are missing.

    The oracle is pre-trained as the base is, for as many steps, on the base's texts without the harmful answers.
    """
    world = build_world(size, seed, refusal_share)
    heading(f"Seed {seed}: data", f"written to {shown(home / 'data')}")
    write_data(home / "data", world, seed)
    print(
        f"{len(world.harmful)} harmful pairs, {len(world.normal)} normal questions, "
        f"{sum(map(len, world.test.values()))} prompts held out for the table"
    )
    for name, pairs in {BASE: world.pretraining, **({ORACLE: world.innocent} if oracle else {})}.items():
        settings = {
            "seed": seed,
            "refusal_share": refusal_share,
            "texts_sha256": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
            **asdict(size),
        }
        heading(f"Seed {seed}: {name} model", f"{len(pairs)} texts, {size.pretraining_steps} steps")
        if is_built(home / name, settings):
            print(f"{shown(home / name)} is there already, with these settings")
        else:
            build_model(home / name, pairs, world, size, seed, settings)
    return world


def unlearn_command(home: Path, seed: int, size: Size, **changes: object) -> list[str]:
    """The unlearning script's command on the world under `home`; `changes` replaces or adds flags."""
    (home / "unlearn.log").unlink(missing_ok=True)  # the script appends
    flags = {
        "model_name": shown(home / "base"),
        "harmful_dataset": shown(home / "data" / "harmful.jsonl"),
        "normal_dataset": shown(home / "data" / "normal.csv"),
        **WEIGHTS,
        "lr": size.unlearning_lr,
        "max_unlearn_steps": size.unlearning_steps,
        "batch_size": 2,
        "seed": seed,
        "precision": "fp32",  # also on machines that have bf16
        "model_save_dir": shown(home / "harmful"),
        "task_vector_saving_path": shown(home / "unlearned"),
        "log_file": shown(home / "unlearn.log"),
        **changes,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["harmful_unlearn/unlearn_harm_new.py", *words, "--overwrite"]


def answers_command(home: Path, world: World) -> list[str]:
    """main.py's command for a few of the world's test prompts."""
    command = ["main.py", "--base", shown(home / "base"), "--unlearned", shown(home / "unlearned"), "--greedy"]
    for name, number in SHOWN.items():
        for prompt in world.test[name][:number]:
            command += ["--normal_prompt" if name == "normal" else "--harmful_prompt", prompt.question]
    return command


def run_command(command: list[str]) -> None:
    """Print a command of the project and run it from the repository's root.

    Raises:
        UserError: it failed (its own message is on the screen).
    """
    lines = ["$ python " + shlex.quote(command[0])]
    for part in command[1:]:
        if part.startswith("--") and len(lines[-1]) > 80:
            lines.append("   ")
        lines[-1] += " " + shlex.quote(part)
    print(" \\\n".join(lines), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        raise UserError(f"{command[0]} ended with exit code {code}: fix what it reports above, and run again")


def measure_models(home: Path, labels: list[str], world: World, seed: int) -> list[dict]:
    """Figures of the models in the folders `labels` of `home`, the base first, on the world's test prompts.

    Returns:
        The evaluation's figures, and the share of each kind of answer (KINDS), in the same form.
    """
    prompts = {
        name: [Prompt(prompt.question, prompt.answer, row) for row, prompt in enumerate(members)]
        for name, members in world.test.items()
    }
    judge = TemplateJudge(prompt for members in world.test.values() for prompt in members)
    protocol = DemoProtocol(
        prompts=prompts,
        decodings=[Decoding(), Decoding(temperature=1.0, top_k=0)],
        max_new_tokens=MAX_NEW_TOKENS,
        tokens_per_batch=1 << 16,
        seed=seed,
        choices={},
    )
    load = partial(load_model, precision="fp32", device_map="cpu")  # also on machines that have bf16 or a GPU
    models = [evaluated_model(label, home / label, load) for label in labels]
    rows = measure(models, protocol, judge, models[0], home / "evaluation")
    return figures(rows, protocol, home / "evaluation") + kind_figures(rows, protocol, judge)


def heading(title: str, detail: str) -> None:
    """Print a line that starts a step."""
    print(f"\n== {title} ({detail})", flush=True)


def shown(path: Path) -> str:
    """A path as commands run from the repository's root take it, short if possible."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def parse_flags(arguments: list[str] | None) -> DemoSettings:
    """The flags."""
    parser = FlagParser(description=__doc__)
    parser.add_settings(DemoSettings)
    return parser.settings(DemoSettings, vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
