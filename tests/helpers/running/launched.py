"""Runs of the script, one after the other, in each of several processes on CPUs (guarantees/test_processes.py)."""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env

from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.training import distributed
from harmful_unlearn.training.run_log import RunLog
from harmful_unlearn.unlearn_harm_new import main


class Sharded(Accelerator):
    """An Accelerator with FSDP2 on CPUs; accelerate itself switches it on for GPUs alone."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )
        self.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class Spread(Accelerator):
    """An Accelerator with DeepSpeed, which else would keep all of a tiny model's weights in each process."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.state.deepspeed_plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }


def run(flags: list[str], sharded: bool = False, stop_after: int | None = None) -> int:
    """Run once. With `stop_after`, the last process alone gets a SIGTERM in that step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    distributed.Accelerator = Sharded if sharded else Accelerator
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        distributed.Accelerator = Spread
        # accelerate has no backend for DeepSpeed without a GPU, unless there is a state already.
        PartialState(backend="gloo", timeout=distributed.TIMEOUT)
    RunLog.step = lambda log, metrics: stopping(stop_after, log, metrics)
    return exit_code(lambda: main(flags))


logged = RunLog.step


def stopping(stop_after: int | None, log: RunLog, metrics: dict) -> None:
    """RunLog.step, with a signal before it."""
    if metrics["step"] == stop_after and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        os.kill(os.getpid(), signal.SIGTERM)
    logged(log, metrics)


if __name__ == "__main__":
    PartialState.destroy_process_group = lambda *_: None  # the runs share it; setting up a second one is not reliable
    codes = [run(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(codes))
