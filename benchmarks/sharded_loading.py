"""Host memory while a model is loaded and sharded over several processes (FSDP2), theta and theta_o.

    python benchmarks/sharded_loading.py --model FOLDER
    python benchmarks/sharded_loading.py --model FOLDER --processes 1 2 4 8

One process reads the weights and sends each its shards, as training does; beside it, every process reads everything.
Each process reports the most that it has resident (VmHWM) above what it has before it loads anything. It runs on CPUs,
where the shards are in the same memory.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType

from benchmarks import measuring
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.errors import UserError
from harmful_unlearn.models import loading
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.storage.files import user_path
from harmful_unlearn.training import distributed

WAYS = {"one process reads": True, "each process reads": False}
GIB = 2**30


def main() -> None:
    """Measure all numbers of processes, and print the table. Raises UserError: a process fails, or this is no Linux."""
    args = parse_flags()
    if "WORLD_SIZE" in os.environ:
        load(args.model, WAYS[args.way], args.out)
        return
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc: run this on Linux")
    os.environ |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    rows = []
    for processes in args.processes:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
                words = [__file__, "--model", str(args.model), "--way", way, "--out", folder]
                measuring.watched([sys.executable, *launcher, *words], "VmRSS", every=1)
                peaks = [json.loads(file.read_text()) / GIB for file in sorted(Path(folder).iterdir())]
            rows.append([processes, way, f"{max(peaks):.2f}", f"{sum(peaks):.2f}"])
    print(measuring.table(["processes", "way", "largest process, GiB", "all together, GiB"], rows))


def load(folder: Path, one_reads: bool, out: Path) -> None:
    """Load and shard theta (float32) and theta_o (bf16) in this process, and write its peak."""
    accelerator = Accelerator(device_placement=False)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", cpu_ram_efficient_loading=one_reads
    )
    accelerator.state.distributed_type = DistributedType.FSDP  # accelerate switches it on for GPUs alone
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    before = measuring.of_process("self", "VmRSS")
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        if accelerator.is_main_process or not one_reads:
            models.append(loading.load_model(folder, dtype))
        else:
            tied = loading.is_tied(loading.empty_model(loading.load_config(folder)))
            models.append(loading.unfilled_model(folder, dtype, tied))
    theta, theta_o = models
    del models
    optimizer = torch.optim.AdamW(theta.parameters())
    distributed.prepare(accelerator, theta, ReferenceModel(theta_o), optimizer, "fp32")
    (out / os.environ["RANK"]).write_text(json.dumps(measuring.of_process("self", "VmHWM") - before))
    accelerator.wait_for_everyone()


def parse_flags() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=user_path, required=True, help="a model's folder")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="how many (default: 1 2 4)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main))
