"""Time and memory of stage 2, compared with copying a folder, the task vector in memory, and mergekit.

    python benchmarks/negation.py [--billions 1.3] [--shards 6] [--runs 3] [--folder DIR] [--mergekit mergekit-yaml]

Writes two random float16 models of OPT's shapes to DIR (a temporary folder by default), removes them at the end, and
prints medians and ratios. Each run does every task once, one after another, so that all see the same machine. The page
cache is warm: nothing is dropped from it. Memory is the peak of RssAnon in /proc/PID/status, polled; pages that map a
file do not count.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.measuring import watched
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import ROOT, user_path

# Both models in memory, in the dtype of their files; the vector in float32.
IN_MEMORY = """
import sys
from transformers import AutoModelForCausalLM
from task_vector import TaskVector
base, harmful = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in sys.argv[1:3])
(-TaskVector(base, harmful)).apply_to(base, in_place=True).save_pretrained(sys.argv[3], max_shard_size="500MB")
"""
# The authors' way: both models and the vector in float32 (implementation details 15 and 16).
RELEASED = """
import sys
import torch
from transformers import AutoModelForCausalLM
base, harmful = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in sys.argv[1:3])
finetuned = harmful.state_dict()
vector = {name: -(finetuned[name] - entry) for name, entry in base.state_dict().items()}
del harmful, finetuned
base.load_state_dict({name: entry + vector[name] for name, entry in base.state_dict().items()})
base.half().save_pretrained(sys.argv[3], max_shard_size="500MB")
"""


def main() -> None:
    """Run the benchmark. Raises UserError: too little disk space, no /proc, a task that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=1.3, help="parameters (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=6, help="files of each model, about (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="how often each task is run (default: %(default)s)")
    parser.add_argument("--folder", type=user_path, help="where to write the models (default: a temporary folder)")
    parser.add_argument("--mergekit", default="mergekit-yaml", help="mergekit's command, if not on PATH")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc: run this on Linux")
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="negation-", dir=args.folder) as folder:
        measure(Path(folder), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Write the models, run every task, print the table."""
    config = opt_config(args.billions)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in OPTForCausalLM(config).parameters())
    size = 2 * parameters  # bytes in float16
    need, free = int(3.1 * size), shutil.disk_usage(folder).free  # two models and one result at a time
    print(f"{size / 2e9:.2f} billion parameters, {size / 1e9:.2f} GB in float16; {need / 1e9:.1f} GB of disk needed")
    if free < need:
        raise UserError(f"{free / 1e9:.1f} GB are free in {folder.parent}: give a --folder with {need / 1e9:.1f} GB")
    base, tuned, out = folder / "base", folder / "tuned", folder / "out"
    make_pair(base, tuned, config, size // args.shards)
    python = [sys.executable, "-c"]
    command = [sys.executable, str(ROOT / "task_vector.py"), "--base", str(base), "--finetuned", str(tuned)]
    paths = [str(base), str(tuned), str(out)]
    tasks = {
        "cp -r of the base": ["cp", "-r", str(base), str(out)],
        "task_vector.py": [*command, "--output", str(out)],
        "of that, starting Python and torch": [*python, "import torch"],
        "TaskVector in memory, float16 models": [*python, IN_MEMORY, *paths],
        "the released way, float32 models": [*python, RELEASED, *paths],
    }
    mergekit = shutil.which(args.mergekit)
    if mergekit:
        tasks["mergekit task_arithmetic, weight -1"] = [mergekit, str(mergekit_recipe(folder, base, tuned)), str(out)]
    figures: dict[str, list[tuple[float, float]]] = {task: [] for task in tasks}
    for number in range(args.runs):
        for task, words in tasks.items():
            seconds, peak, _ = watched(words, "RssAnon")
            figures[task].append((seconds, peak / 1e9))
            shutil.rmtree(out, ignore_errors=True)
            print(f"run {number + 1}: {task}: {figures[task][-1][0]:.1f} s, {figures[task][-1][1]:.2f} GB", flush=True)
    medians = {task: list(map(statistics.median, zip(*rows, strict=True))) for task, rows in figures.items()}
    copied = medians["cp -r of the base"][0]
    merged = medians.get("mergekit task_arithmetic, weight -1", [None])[0]
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory")
    print("\n| task | seconds | range | anonymous memory | times cp | times mergekit |\n" + "| --- " * 6 + "|")
    for task, (seconds, memory) in medians.items():
        times = [row[0] for row in figures[task]]
        ratio = f"{seconds / merged:.2f}" if merged else "not installed"
        spread = f"{min(times):.1f}-{max(times):.1f}"
        print(f"| {task} | {seconds:.1f} | {spread} | {memory:.2f} GB | {seconds / copied:.2f} | {ratio} |")


def opt_config(billions: float) -> OPTConfig:
    """OPT-1.3B's configuration, with the number of layers that gives the size."""
    layer = 12 * 2048**2 / 1e9
    layers = max(round((billions - 50272 * 2048 / 1e9) / layer), 1)
    sizes = {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048}
    return OPTConfig(num_hidden_layers=layers, **sizes)


def make_pair(base: Path, tuned: Path, config: OPTConfig, shard_size: int, device: str = "cpu") -> None:
    """A random model, and the same plus noise of standard deviation 0.001, in files of up to `shard_size` bytes."""
    torch.manual_seed(0)
    with torch.device(device):
        model = OPTForCausalLM(config).half()
    model.save_pretrained(base, max_shard_size=shard_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))
    model.save_pretrained(tuned, max_shard_size=shard_size)


def mergekit_recipe(folder: Path, base: Path, tuned: Path) -> Path:
    """base - (tuned - base), for mergekit."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": -1.0}}],
        "dtype": "float16",
    }
    path = folder / "recipe.yml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


if __name__ == "__main__":
    sys.exit(exit_code(main))
