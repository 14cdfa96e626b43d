"""The peak of a run's memory, against its plan.

    python benchmarks/memory.py
    python benchmarks/memory.py --model FOLDER --harmful_dataset pku.parquet --normal_dataset TruthfulQA.csv
    python benchmarks/memory.py --model FOLDER --trains LoRA --precisions bf16 --steps 50

Starts stage 1 of unlearn_harm_new.py as a process of its own, for every weight and LoRA, in fp32 and bf16, and reads
the most that the process has resident at once (VmHWM), its saved model included. The plan is what the run itself
prints before it starts, as --check does. By default the model is a small random OPT, and the data are random words.
Other programs on the machine do not matter: they change how long a run takes, and not what it holds.

What is done is kept in --record; the same command continues, and prints the whole table.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import made_up, measuring
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import ROOT, user_path

GIB = 2**30
TRAINS = {"full": "off", "LoRA": "on"}  # values of --lora
PLANNED = re.compile(r"^memory +about ([\d.]+) GiB a process \((.+)\)", re.MULTILINE)


def main() -> None:
    """Measure what is lacking, and print the table. Raises UserError: a run fails, or this is no Linux."""
    args = parse_flags()
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc: run this on Linux")
    args.record.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(args.record.read_text()) if args.record.exists() else {}
    name = Path(args.model).name if args.model else f"OPT {args.hidden} x {args.layers}"
    rows, plans = [], []
    with tempfile.TemporaryDirectory(prefix="memory-", dir=args.folder) as folder:
        model, harmful, normal = args.model, args.harmful_dataset, args.normal_dataset
        if not model or not harmful or not normal:
            config = made_up.opt_config(args.hidden, args.layers, args.vocabulary)
            made = made_up.write(Path(folder), config)
            model, harmful, normal = model or made[0], harmful or made[1], normal or made[2]
        for trains in args.trains:
            for precision in args.precisions:
                data = f"{Path(harmful).name}, {Path(normal).name}"
                key = f"{name}, {trains}, {precision}, {args.steps} steps, {data} {' '.join(args.more)}".strip()
                if key not in done:
                    words = command(model, harmful, normal, TRAINS[trains], precision, args, Path(folder))
                    done[key] = peak(words)
                    args.record.write_text(json.dumps(done, indent=2) + "\n")
                planned, measured = done[key]["planned"], done[key]["measured"]
                ratio = f"{measured / planned:.2f}"
                plans.append(done[key].get("parts", "not kept"))
                rows.append([name, trains, precision, args.steps, f"{planned:.2f}", f"{measured:.2f}", ratio])
    header = ["model", "trains", "precision", "steps", "plan, GiB", "measured, GiB", "measured / plan"]
    print(measuring.table(header, rows))
    print("\nThe plans, GiB:")
    for row, parts in zip(rows, plans, strict=True):
        print(f"{', '.join(map(str, row[:4]))} steps: {parts}")


def command(
    model: Path | str,
    harmful: Path | str,
    normal: Path | str,
    lora: str,
    precision: str,
    args: argparse.Namespace,
    folder: Path,
) -> list[str]:
    """Stage 1 with these flags."""
    flags = {
        "--stage": "acquire",
        "--max_unlearn_steps": args.steps,
        "--model_name": model,
        "--harmful_dataset": harmful,
        "--normal_dataset": normal,
        "--lora": lora,
        "--precision": precision,
        "--lr": "1e-5",
        "--model_save_dir": folder / "harmful",
        "--task_vector_saving_path": folder / "unlearned",
        "--log_file": folder / "logs" / "run.log",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return [sys.executable, str(ROOT / "harmful_unlearn" / "unlearn_harm_new.py"), *words, "--overwrite", *args.more]


def peak(words: list[str]) -> dict[str, Any]:
    """What a run's plan says, in all and by its parts, and the most that it had resident, in GiB; and its seconds."""
    seconds, most, printed = measuring.watched(words, "VmHWM", every=0.05)
    plan = PLANNED.search(printed)
    if not plan:
        raise UserError(f"the run printed no plan: {printed[-1000:]}")
    return {"planned": float(plan[1]), "parts": plan[2], "measured": most / GIB, "seconds": round(seconds, 1)}


def parse_flags() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", help="a folder with a model (default: a random OPT)")
    made_up.add_shape(parser)
    add("--harmful_dataset", help="PKU-SafeRLHF, or a file with its columns (default: random words)")
    add("--normal_dataset", help="TruthfulQA.csv, or a file with its columns (default: random words)")
    add("--trains", nargs="+", choices=TRAINS, default=[*TRAINS], help="(default: both)")
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="(default: both)")
    add("--steps", type=int, default=200, help="of each run (default: %(default)s)")
    record = ROOT / "logs" / "benchmark-memory.json"
    add("--record", type=user_path, default=record, help="what is done (default: logs/benchmark-memory.json)")
    add("--folder", type=user_path, help="where runs save their models for a while (default: a temporary folder)")
    add("--more", nargs=argparse.REMAINDER, default=[], help="other flags for the runs; the last flag")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main))
