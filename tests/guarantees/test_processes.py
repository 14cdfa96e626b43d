"""Several processes give what one does: DDP and FSDP2 on CPUs, stopped and resumed, and what does not go together."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.training import deepspeed, distributed
from harmful_unlearn.training.engine import Engine
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.running import runs

# The gradient of this bias is zero but for rounding, which AdamW makes steps of.
NOISE = "k_proj.bias"
CASES = {
    "full": ("opt", []),
    "LoRA": ("qwen2", ["--lora", "on"]),
    "landing": ("llama", ["--method", "lands"]),
    "landing with LoRA": ("opt", ["--method", "lands", "--lora", "on"]),
    "NPO": ("llama", ["--method", "npo"]),
    "DPO in plain rows": ("opt", ["--method", "dpo", "--no_packing"]),
    "Safe Unlearning with LoRA": ("qwen2", ["--method", "safe_unlearning", "--lora", "on"]),
    "RMU": ("llama", ["--method", "rmu"]),
    "RMU with LoRA, checkpointed": ("opt", ["--method", "rmu", "--lora", "on", "--gradient_checkpointing"]),
    "plain rows, checkpointed": ("llama", ["--no_packing", "--gradient_checkpointing"]),
}


def flags(model: Path, out: Path, batch_size: int, more: list[str]) -> list[str]:
    steps = ["--max_unlearn_steps", "5", "--batch_size", str(batch_size)]
    return runs.flags(model, out, *steps, "--log_file", str(out / "run.log"), *more)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ZERO3 = [
    "accelerate.commands.launch", "--config_file", str(ROOT / "harmful_unlearn" / "launch" / "zero3_offload.yaml"),
    "--num_processes", "2", "--main_process_port", "0",
]  # fmt: skip


def launch(jobs: list[dict], folder: Path, launcher: list[str] = TORCHRUN) -> tuple[list[int], str]:
    """The exit codes of runs in two processes, which are the same in both, and what they said on stderr."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env |= {"ACCELERATE_USE_CPU": "1"} if launcher is TORCHRUN else {}  # with it there is no DeepSpeed
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(ROOT / "tests" / "helpers" / "running" / "launched.py"), str(file)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120 if launcher is TORCHRUN else 400,  # it may be compiled
    )
    assert done.returncode == 0, done.stderr[-8000:]
    codes = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in (0, 1)]
    assert codes[0] == codes[1]
    assert done.stdout.count("stage 1 model saved") == codes[0].count(0)  # by the main process alone
    return codes[0], done.stderr


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "run.metrics.jsonl").read_text().splitlines()]


def weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    (file,) = (out / stage).glob("*.safetensors")
    return load_file(file)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """To rounding: metrics, and the weights of both stages."""
    for one, other in zip(metrics_of(ours), metrics_of(theirs), strict=True):
        assert one["tokens"] == other["tokens"]
        for name in one.keys() - {"seconds"} - {name for name, value in one.items() if value is None}:
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), name
    for stage in ("harmful", "unlearned"):
        one, other = weights(ours, stage), weights(theirs, stage)
        assert one.keys() == other.keys()
        for name in one:
            if NOISE not in name:
                torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "case", ["landing", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "landing")]
)
def test_two_processes_give_what_one_does_and_resume_to_the_bit(case, tiny_model, tmp_path):
    """DDP and FSDP2; a SIGTERM that reaches one process alone stops both, after a checkpoint at the same step."""
    architecture, more = CASES[case]
    base = tiny_model(architecture)
    main(flags(base, tmp_path / "one", 4, more))
    jobs = []
    for engine, sharded in (("ddp", False), ("fsdp", True)):
        whole, stopped = (flags(base, tmp_path / f"{engine}{kind}", 2, more) for kind in ("", "-stopped"))
        jobs += [
            {"flags": whole, "sharded": sharded},
            {"flags": [*stopped, "--stage", "acquire"], "sharded": sharded, "stop_after": 2},
            {"flags": [*stopped, "--resume"], "sharded": sharded},
        ]
    codes, _ = launch(jobs, tmp_path)
    assert codes == [0, 143, 0] * 2
    for engine in ("ddp", "fsdp"):
        ours, stopped = tmp_path / engine, tmp_path / f"{engine}-stopped"
        assert_same_run(ours, tmp_path / "one")
        record = json.loads((ours / "harmful" / "run.json").read_text())
        assert record["training"]["processes"] == 2
        for stage in ("harmful", "unlearned"):
            one, other = weights(ours, stage), weights(stopped, stage)
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert [step["step"] for step in metrics_of(stopped)] == [1, 2, 3, 4, 5]
        assert (stopped / "harmful" / "config.json").exists() == (ours / "harmful" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("offloaded", [True, False], ids=["offloaded", "on the device"])
def test_zero3_gives_what_one_process_does_and_keeps_no_checkpoints(offloaded, tiny_model, tmp_path):
    cases = {
        "full": CASES["full"],
        "LoRA": CASES["LoRA"],
        "plain head": ("llama", ["--method", "ga_mismatch", "--no_packing", "--gradient_checkpointing"]),
        "no base": ("qwen2", ["--method", "ft"]),
        "bf16": ("opt", ["--precision", "bf16"]),
    }
    jobs = [{"flags": flags(tiny_model(model), tmp_path / case, 2, more)} for case, (model, more) in cases.items()]
    for number, more in enumerate((["--save_every", "2"], ["--resume"], ["--method", "lands"])):
        jobs.append({"flags": flags(tiny_model("opt"), tmp_path / f"refused-{number}", 2, more)})
    jobs.append({"flags": flags(tiny_model("opt"), tmp_path / "stopped", 2, []), "stop_after": 2})
    where = [] if offloaded else ["--offload_optimizer_device", "none", "--offload_param_device", "none"]
    codes, said = launch(jobs, tmp_path, [*ZERO3, *where])
    assert codes == [0] * len(cases) + [2, 2, 2, 143]
    assert said.count("error: DeepSpeed saves no checkpoints, so --save_every and --resume do not work with it") == 2
    assert said.count("error: DeepSpeed updates after every backward pass, and landing needs two") == 1
    assert "stopping after this step; once more to stop at once" in said
    assert "stopped after step 3; DeepSpeed saves no checkpoints: start again" in said
    assert not [*tmp_path.glob("refused-*"), *(tmp_path / "stopped").glob("harmful*")]
    for case, (model, more) in cases.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        main(flags(tiny_model(model), tmp_path / "one" / case, 4, more))
        if case == "bf16":  # by autocast here; its rounding is another, and depends on the shares, more with every step
            first = [metrics_of(folder)[0]["gd_loss"] for folder in (tmp_path / "one" / case, tmp_path / case)]
            assert first[1] == pytest.approx(first[0], abs=1e-4)
            assert first[1] != metrics_of(tmp_path / "full")[0]["gd_loss"]
            continue
        assert_same_run(tmp_path / case, tmp_path / "one" / case)
        for stage in ("harmful", "unlearned"):
            ours, theirs = (folder / stage for folder in (tmp_path / case, tmp_path / "one" / case))
            assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
            for config in ours.glob("config.json"):
                assert json.loads(config.read_text()) == json.loads((theirs / config.name).read_text())


@pytest.mark.parametrize("file", (ROOT / "harmful_unlearn" / "launch").glob("*.yaml"), ids=lambda file: file.stem)
def test_configurations_are_accelerates_own(file):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"  # --precision says
    if file.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    if file.stem == "zero3_offload":
        assert config.deepspeed_config["zero_stage"] == 3


def test_processes_without_a_device_are_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU=1"):
        main(flags(tiny_model("opt"), tmp_path, 2, []))


def test_deepspeed_without_a_device_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(UserError, match="needs a GPU"):
        main(flags(tiny_model("opt"), tmp_path, 2, []))


def set_up_for(stage: int = 3, **settings) -> dict:
    """DeepSpeed's configuration once a run has set it up."""
    config = {"gradient_accumulation_steps": 1, "gradient_clipping": "auto", **settings}
    deepspeed.configure(SimpleNamespace(zero_stage=stage, deepspeed_config=config), 2)
    return config


@pytest.mark.parametrize(
    "settings", [{"stage": 2}, {"gradient_accumulation_steps": 2}, {"optimizer": {"type": "Adam"}}]
)
def test_deepspeed_that_computes_something_else_is_refused(settings):
    with pytest.raises(UserError, match="zero3_offload.yaml"):
        set_up_for(**settings)


def test_deepspeed_clips_no_gradients_unless_told_to():
    assert set_up_for()["gradient_clipping"] == 0
    assert set_up_for(gradient_clipping=0.5)["gradient_clipping"] == 0.5


def test_a_tracker_that_is_not_installed_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        main(flags(tiny_model("opt"), tmp_path, 2, ["--report_to", "wandb"]))


def test_a_tracker_that_cannot_start_is_one_line(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")

    def fail(*_):
        raise RuntimeError("no API key")

    monkeypatch.setattr(distributed.Accelerator, "init_trackers", fail)
    with pytest.raises(UserError, match=r"tensorboard cannot start \(no API key\)"):
        main(flags(tiny_model("opt"), tmp_path, 2, ["--report_to", "tensorboard"]))


def test_wandb_continues_its_run_when_the_run_is_resumed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: True)
    started = []
    monkeypatch.setattr(distributed.Accelerator, "init_trackers", lambda *args: started.append(args[-1]["wandb"]))
    words = flags(tiny_model("opt"), tmp_path, 2, ["--report_to", "wandb", "--save_every", "2"])
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(Engine, "save", Mock(side_effect=UserError("no room")))
        main(words)
    main([*words, "--resume"])
    main([*words, "--overwrite"])
    assert started[0] == started[1] and started[0]["resume"] == "allow"
    assert started[2]["id"] != started[0]["id"], "another run"


def test_tensorboard_gets_every_step(tiny_model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(flags(tiny_model("opt"), tmp_path, 2, ["--report_to", "tensorboard"]))
    (events,) = tmp_path.glob("run.tensorboard/events*")
    found = EventAccumulator(str(events))
    found.Reload()
    assert [event.step for event in found.Scalars("gd_loss")] == [1, 2, 3, 4, 5]
