"""What the benchmarks share: the machine's own rate, time, needed products, where time goes, memory, tables."""

import ctypes
import gc
import os
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is silent; before torch is imported

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.terms import LOSSES
from harmful_unlearn.models.lora import linear_layers
from harmful_unlearn.storage.files import ROOT

MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE_OF_MATRIX = {"cuda": 8192, "cpu": 2048}  # whose product tells the machine's rate
KINDS = ("matrix products", "attention", "copies and casts", "head and losses", "other")
ATTENTION = re.compile("TreeAttention|scaled_dot_product|flex_attention|flash|_softmax")
COPIES = re.compile("copy_|_to_copy|clone|contiguous|aten::cat|aten::to$|aten::fill_|aten::zero_|memcpy|memset", re.I)
PRODUCTS = re.compile("aten::(mm|addmm|bmm|baddbmm|matmul|linear)|mkldnn_linear|gemm|bnb|bitsandbytes", re.I)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes, on the GPU too."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product, the best of four, with the threads that torch has now."""
    size = SIDE_OF_MATRIX[device.type]
    matrix = torch.randn(size, size, device=device, dtype=DTYPES[precision])
    with torch.inference_mode():
        return 2 * size**3 / min(seconds_of(lambda: F.linear(matrix, matrix), device) for _ in range(4))


def needed_flops(model: PreTrainedModel, passes: Iterable[StepBatch], weights: Mapping[str, float]) -> float:
    """The floating-point operations of a step's matrix products.

    2 a weight of a linear layer and token, each for the forward pass, the gradient of the activations, and, unless the
    layer is frozen, the gradient of the weight. The LM head reads the scored positions only. The base reads the texts
    of the divergences forward. Attention's own products, a few percent, do not count; nor do experts.

    Args:
        model: theta; with an adapter, its small layers count, too.
        passes: packed, so that a question counts once. Padding does not count.
        weights: of the loss terms, by name.
    """
    layers: list[Any] = [module for _, module in linear_layers(model)]
    body = sum(_size(layer) * (2 + layer.weight.requires_grad) for layer in layers)
    of_base = sum(_size(layer) for layer in layers if not layer.weight.requires_grad or not _has_adapter(model))
    head: Any = model.get_output_embeddings()
    terms = [LOSSES[name] for name, weight in weights.items() if weight]
    by_base = [term for term in terms if term.value == "kl" or (term.of_text and term.of_text.against_base)]
    read_by_base = {term.batch for term in by_base}
    total = 0
    for step in passes:
        for name in {term.batch for term in terms}:
            if (batch := getattr(step, name)) is None:
                continue
            scored, again = len(batch.row), name in read_by_base
            total += batch.tokens * (body + again * of_base)
            total += scored * _size(head) * (2 + head.weight.requires_grad + again)
    return 2.0 * total


def computed_flops(work: Callable[[], object]) -> int:
    """The floating-point operations of the matrix products in one run of `work`, padding included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def _size(layer) -> int:
    """Number of weights of a linear layer, also of one in 4 bits."""
    sizes = getattr(layer, "in_features", 0) * getattr(layer, "out_features", 0)
    return sizes or layer.weight.numel()


def _has_adapter(model: torch.nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def where_time_goes(work: Callable[[], object], device: torch.device, vocabulary: int) -> dict[str, float]:
    """The share of each of KINDS in the time of one run of `work`: of kernels on a GPU, of operations on a CPU.

    What has the vocabulary in a shape belongs to the head and the losses. Attention's own products are attention.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        work()
        synchronize(device)
    shares = dict.fromkeys(KINDS, 0.0)
    for event in profiler.events():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0 and not (on_gpu and event.device_type != torch.autograd.DeviceType.CPU):
            shares[_kind(event, vocabulary)] += spent
    total = sum(shares.values()) or 1
    return {kind: spent / total for kind, spent in shares.items()}


def _kind(event, vocabulary: int) -> str:
    names, ancestor = [], event
    while ancestor is not None:
        names.append(ancestor.name)
        ancestor = ancestor.cpu_parent
    if any(map(ATTENTION.search, names)) and not _reads(event, vocabulary):
        return "attention"
    if COPIES.search(event.name):
        return "copies and casts"
    if _reads(event, vocabulary):
        return "head and losses"
    return "matrix products" if PRODUCTS.search(event.name) else "other"


def _reads(event, vocabulary: int) -> bool:
    return any(vocabulary in shape for shape in event.input_shapes or () if isinstance(shape, list | tuple))


def in_memory(device: torch.device) -> int:
    """Bytes that this process has now, on the GPU or resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had at its peak since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return of_process("self", "VmHWM")


def forget_peak(device: torch.device) -> None:
    """Give back what is freed but kept, and start the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with suppress(OSError):  # where it is not allowed, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def of_process(process: int | str, field: str) -> int:
    """A field of /proc/PROCESS/status in bytes, as VmHWM (resident at the peak) or RssAnon; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def watched(words: list[str], field: str, every: float = 0.01) -> tuple[float, int, str]:
    """Run a command.

    Args:
        field: of /proc/PID/status, read `every` so many seconds.

    Returns:
        Its seconds, the largest value of the field in bytes, and what it printed.

    Raises:
        UserError: it fails.
    """
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                peak = max(peak, of_process(process.pid, field))
                time.sleep(every)
        finally:
            process.kill()
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise UserError(f"{' '.join(words[:2])} failed: {printed[-2000:]}")
    return seconds, peak, printed


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    names = list(header)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
