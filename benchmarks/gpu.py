"""Every GPU row of RESULTS.md, within about 8 minutes on one H100 or H200: `make bench-gpu`.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts check "OPT-2.7B, every weight" --minutes 3
    python benchmarks/gpu.py --device cpu --tiny    # tiny shapes, only to see that every line runs

First, CUDA against this machine's CPU: losses and gradients of all loss terms on small models, packed rows through
FlexAttention and through the loop, and plain rows. If they are wrong, it stops. Then steps (forward, backward, AdamW)
of models of the true size with random weights, made on the GPU (nothing is downloaded), bf16, batch 2, K 5, words in
PKU-SafeRLHF's lengths: packed rows with tree attention, and plain rows without; the peak of the GPU's memory, which
counts what torch allocates, against the plan of unlearn_harm_new.py; stage 2 from disk; and an evaluation. A part that
fails, or for which no time is left, loses its own rows only.

THIS HAS NEVER RUN ON CUDA. No GPU was at hand when it was written: only the line with --device cpu has run.
"""

import argparse
import copy
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from benchmarks import evaluation, made_up, measuring, negation
from benchmarks.gpu_check import CHECKED, Wrong, check
from benchmarks.released import WEIGHTS
from benchmarks.step import backward
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.step_batches import StepBatch, StepBatches, run_sampler
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.errors import UserError, first_line
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.losses.packing_check import max_packed_length
from harmful_unlearn.losses.terms import reads
from harmful_unlearn.models.loading import context_length
from harmful_unlearn.models.lora import Lora, add_lora, linear_layers
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.storage.files import ROOT, user_path
from harmful_unlearn.training.flags import parse_flags as run_flags
from harmful_unlearn.training.plan import make_plan
from harmful_unlearn.training.setup import default_tokens_per_pass
from harmful_unlearn.unlearn_harm_new import MODELS

GIB = 2**30
WARM_UP, MOST_STEPS, LONGEST = 3, 10, 12.0  # steps; steps; seconds of steps that are timed


def _opt(hidden: int, layers: int, heads: int, vocabulary: int = 50272) -> OPTConfig:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "vocab_size": vocabulary}
    return OPTConfig(num_hidden_layers=layers, num_attention_heads=heads, **sizes)  # its dropout is the published one


def _llama(hidden: int, layers: int, heads: int, inner: int, vocabulary: int = 32000) -> LlamaConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary}
    return LlamaConfig(num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=4096, **sizes)


# The published shapes, and tiny ones.
CONFIGS: dict[str, tuple[PretrainedConfig, PretrainedConfig]] = {
    "facebook/opt-1.3b": (_opt(2048, 24, 32), _opt(64, 2, 2, 1000)),
    "facebook/opt-2.7b": (_opt(2560, 32, 32), _opt(64, 3, 2, 1000)),
    "meta-llama/Llama-2-7b-hf": (_llama(4096, 32, 32, 11008), _llama(64, 2, 2, 128, 1000)),
    "meta-llama/Llama-2-13b-hf": (_llama(5120, 40, 40, 13824), _llama(64, 3, 2, 128, 1000)),
}
TRAINED = {  # part: (model, whether its base is in 4 bits)
    "OPT-1.3B, every weight": ("facebook/opt-1.3b", False),
    "OPT-2.7B, every weight": ("facebook/opt-2.7b", False),
    "LLaMA2-7B, LoRA": ("meta-llama/Llama-2-7b-hf", False),
    "LLaMA2-13B, LoRA": ("meta-llama/Llama-2-13b-hf", False),
    "LLaMA2-7B, LoRA, 4-bit": ("meta-llama/Llama-2-7b-hf", True),
    "LLaMA2-13B, LoRA, 4-bit": ("meta-llama/Llama-2-13b-hf", True),
}
HEADERS = {
    "check": CHECKED,
    "steps": [
        "model, bf16", "rows", "seconds a step", "1,000 steps, s", "of the card's rate", "peak, GiB", "plan, GiB",
        "peak / plan",
    ],
    "stage 2": ["stage 2 from disk, float16", "GB read", "seconds", "anonymous memory, GB"],
    "evaluation": ["evaluation, bf16", "way", "seconds", "tokens", "tokens a second"],
}  # fmt: skip


def main() -> None:
    """Run all parts, print the tables, write them as JSON. Raises UserError: no GPU, or wrong figures."""
    args = parse_flags()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU was found, and this measures one: --device cpu --tiny only shows that it runs")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    end = time.perf_counter() + 60 * args.minutes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    rate = measuring.matmul_rate(device, "bf16")
    report: dict = {"device": name, "bf16_flops": rate, "tables": {title: [] for title in HEADERS}, "notes": []}
    works: dict[str, Callable[[], tuple[str, list[list]]]] = {"check": lambda: ("check", check(device))}
    for part in TRAINED:
        works[part] = lambda part=part: ("steps", steps(part, device, args.tiny, rate))  # type: ignore[misc]
    works["stage 2"] = lambda: ("stage 2", stage_2(device, args.tiny, args.folder))
    works["evaluation"] = lambda: ("evaluation", evaluated(device, args.tiny))
    for part in args.parts:
        started = time.perf_counter()
        if started > end:
            report["notes"].append(f"{part}: not measured, no time was left")
            continue
        try:
            title, rows = works[part]()
            report["tables"][title] += rows
        except Wrong:
            raise
        except Exception as error:  # whatever it is, the other parts are worth having
            report["notes"].append(f"{part}: not measured ({type(error).__name__}: {first_line(error)})")
        print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        measuring.forget_peak(device)
        torch.compiler.reset()  # else the many shapes would end compilation
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{name}, torch {torch.__version__}; its own bf16 rate: {rate / 1e12:.3g} TFLOP/s; batch 2, K 5\n")
    for title, rows in report["tables"].items():
        if rows:
            print(measuring.table(HEADERS[title], rows) + "\n")
    print("\n".join(report["notes"]))


# --- Steps --------------------------------------------------------------------------------------------------------


def steps(part: str, device: torch.device, tiny: bool, rate: float) -> list[list]:
    """Packed and plain rows of a model: seconds a step, share of the card's rate, and peak against the plan."""
    name, four_bit = TRAINED[part]
    if four_bit and find_spec("bitsandbytes") is None:
        raise UserError("bitsandbytes is not installed")
    config, lora = CONFIGS[name][tiny], MODELS[name]
    tokenizer = made_up.word_tokenizer(config.vocab_size)
    collator = Collator(ReleasedTemplate(tokenizer), "released", context_length(config))
    harmful, normal = made_up.data(tokenizer, answer=15 if tiny else made_up.ANSWER)
    model, base = models_of(config, lora, four_bit, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    packed_up_to, reason = max_packed_length(model, collator)
    model.train()
    objective = Objective(model, WEIGHTS, base)
    needed = reads(WEIGHTS)
    sampler = run_sampler({"batch_size": 2, "k_random": 5, "seed": 8888}, 1, harmful, normal, needed)
    limit = default_tokens_per_pass(device)
    flags = ["--model_name", name, *(["--quantize", "4bit"] if four_bit else [])]
    with torch.device("meta"):
        structure = AutoModelForCausalLM.from_config(config)
    layouts = {"packed, tree attention": packed_up_to, "plain": 0}
    if reason:
        layouts = {f"plain: {reason}": 0}
    rows = []
    for layout, up_to in layouts.items():
        batches = StepBatches(collator, sampler, harmful, normal, needed, up_to, limit)
        measuring.forget_peak(device)
        times: list[float] = []
        needs: list[float] = []

        def step(number: int, batches: StepBatches = batches) -> list[StepBatch]:
            passes = batches(number, device)
            backward(model, objective, passes, "bf16", {})
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            return passes

        warm_up, most_steps = (1, 1) if tiny else (WARM_UP, MOST_STEPS)
        for number in range(warm_up):
            step(number)
        while len(times) < most_steps and sum(times) < LONGEST:
            number = warm_up + len(times)
            times.append(measuring.seconds_of(lambda number=number: step(number), device))  # type: ignore[misc]
            packed = StepBatches(collator, sampler, harmful, normal, needed, math.inf, limit)(number, device)
            needs.append(measuring.needed_flops(model, packed, WEIGHTS))
        peak = measuring.peak_memory(device)
        planned = sum(make_plan(run_flags(flags), batches, structure, lora, "bf16", 1, device).memory.values())
        seconds = statistics.median(times)
        share = f"{sum(needs) / sum(times) / rate:.0%}"
        memory = [f"{peak / GIB:.2f}", f"{planned / GIB:.2f}", f"{peak / planned:.2f}"]
        rows.append([part, layout, f"{seconds:.3f}", f"{1000 * seconds:.0f}", share, *memory])
    return rows


def models_of(
    config: PretrainedConfig, lora: Lora | None, four_bit: bool, device: torch.device
) -> tuple[PreTrainedModel, ReferenceModel]:
    """theta and theta_o with random weights, as a run in bf16 holds them."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
    if not lora:
        return model, ReferenceModel(copy.deepcopy(model).to(torch.bfloat16), "bf16")
    if four_bit:
        to_four_bits(model, device)
    model = add_lora(model, lora, "base")
    return model, ReferenceModel(model)


def to_four_bits(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the linear layers in NF4 with quantized scales, as `models.loading.load_model` does."""
    import bitsandbytes

    for name, layer in linear_layers(model):
        sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        four = bitsandbytes.nn.Linear4bit(*sizes, bias=has_bias, compute_dtype=torch.bfloat16, quant_type="nf4")
        four.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        if has_bias:
            four.bias = layer.bias
        model.set_submodule(name, four.to(device))  # it is quantized on its way
    model.is_loaded_in_4bit = True  # PEFT asks


# --- Stage 2 and evaluation ---------------------------------------------------------------------------------------


def stage_2(device: torch.device, tiny: bool, parent: Path | None) -> list[list]:
    """Negation of OPT-2.7B in float16, in shards of about 1 GB; the page cache is warm."""
    config = CONFIGS["facebook/opt-2.7b"][tiny]
    with tempfile.TemporaryDirectory(prefix="negation-", dir=parent) as folder:
        base, tuned, out = (Path(folder) / name for name in ("base", "tuned", "out"))
        negation.make_pair(base, tuned, config, 10**9, str(device))
        size = sum(file.stat().st_size for at in (base, tuned) for file in at.glob("*.safetensors"))
        command = [sys.executable, str(ROOT / "task_vector.py"), "--base", str(base), "--finetuned", str(tuned)]
        figures = []
        for _ in range(2):
            figures.append(measuring.watched([*command, "--output", str(out)], "RssAnon"))
            shutil.rmtree(out, ignore_errors=True)
    seconds, peak, _ = min(figures)
    return [["OPT-2.7B, task_vector.py", f"{size / 1e9:.2f}", f"{seconds:.1f}", f"{peak / 1e9:.2f}"]]


def evaluated(device: torch.device, tiny: bool) -> list[list]:
    """Answers to 64 prompts, at most 80 tokens each, and scores, by LLaMA2-7B; the second of two runs."""
    config = CONFIGS["meta-llama/Llama-2-7b-hf"][tiny]
    template = ReleasedTemplate(made_up.word_tokenizer(config.vocab_size))
    pairs = made_up.data(template.tokenizer)[0].pairs[: 8 if tiny else 64]
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    limits = (8 if tiny else 80, evaluation.TOKENS_PER_BATCH)
    rows = []
    for (name, way), work in evaluation.works_of(model, template, pairs, *limits).items():
        work.run(device)
        work.run(device)
        seconds = work.seconds[-1]
        rows.append([f"LLaMA2-7B, {name}", way, f"{seconds:.2f}", work.tokens, f"{work.tokens / seconds:.0f}"])
    return rows


def parse_flags() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    parts = ["check", *TRAINED, "stage 2", "evaluation"]
    add("--parts", nargs="+", choices=parts, default=parts, help="(default: all)")
    add("--minutes", type=float, default=8, help="no part is started later (default: %(default)s)")
    add("--device", default="cuda", help="(default: %(default)s)")
    add("--tiny", action="store_true", help="tiny models in place of the true sizes")
    add("--folder", type=user_path, help="where stage 2's models are for a while (default: a temporary folder)")
    output = ROOT / "logs" / "benchmark-gpu.json"
    add("--output", type=user_path, default=output, help="the tables as JSON (default: logs/benchmark-gpu.json)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main))
