"""One stage 1 step of SKU, forward and backward: the released computation, ours in plain rows, ours packed.

    python benchmarks/step.py
    python benchmarks/step.py --hidden 512 --layers 8 --precision bf16
    python benchmarks/step.py --ways packed "at the landing point" lands --lora    # what landing costs
    python benchmarks/step.py --model facebook/opt-2.7b --lora --precision bf16 --ways "plain rows" packed    # on a GPU

Random weights of an OPT of that shape (or of --model's configuration) and random texts: PKU-SafeRLHF itself is not
needed. The released computation is in float32, as the authors' runs were; --precision is that of the others. All
run in turn in one process, so that a noisy machine is noisy for all; peak memory is each one's own, in a process of
its own. The losses must agree, or no figure is printed.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, PreTrainedTokenizerFast

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair, format_pair, format_prefix
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.losses.landing import LandingPoint
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.models.reference import ReferenceModel

WEIGHTS = {"gd": 2.5, "rd": 2.5, "pd": 1.0}
OURS = {  # of packed rows: SKU; the same batch with PD at the landing point; and --method lands
    "packed": (WEIGHTS, 1.0),
    "at the landing point": ({"gd": 2.5, "rd": 2.5, "lp": 1.0}, 3.0),
    "lands": ({"gd": 1.0, "lp": 0.3, "sa": 0.1}, 4.0),
}
LONGEST = 400  # tokens of an answer


def main() -> None:
    """Measure and print the table."""
    args = parse_flags()
    if args.memory_of:
        print(json.dumps(peak_memory(args)))
        return
    setting = Setting(args)
    times: dict[str, list[float]] = {name: [] for name in args.ways}
    losses: dict[str, dict[str, float]] = {}
    for name in args.ways:  # warm up, and check that all compute the same
        losses[name] = setting.run(name, setting.texts(0))[1]
    close = 1e-3 if args.precision == "fp32" else 3e-2
    first = losses[args.ways[0]]
    pairs = [(first[loss], value) for values in losses.values() for loss, value in values.items() if loss in first]
    if any(abs(expected - value) > close * max(1, abs(expected)) for expected, value in pairs):
        sys.exit(f"the losses differ, so no time is worth printing: {losses}")
    for step in range(args.repeat):
        texts = setting.texts(step)
        for name in args.ways:
            times[name].append(setting.run(name, texts)[0])
    memory = {name: setting.own_process(name) for name in args.ways}
    print(report(setting, times, memory))


class Setting:
    """Models, tokenizer and texts of a run."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        config = (
            AutoConfig.from_pretrained(args.model)
            if args.model
            else OPTConfig(
                hidden_size=args.hidden,
                num_hidden_layers=args.layers,
                num_attention_heads=args.hidden // 64,
                ffn_dim=4 * args.hidden,
                word_embed_proj_dim=args.hidden,
                vocab_size=args.vocabulary,
                max_position_embeddings=2048,
                dropout=0.0,
                attention_dropout=0.0,
            )
        )
        self.vocabulary = config.vocab_size
        self.tokenizer = word_tokenizer(self.vocabulary)
        self.collator = Collator(self.tokenizer, "released", 2048)
        half = args.precision == "bf16" and (args.lora or self.device.type == "cuda" and not LANDING & {*args.ways})
        frozen = torch.bfloat16 if half else None
        torch.manual_seed(0)
        with self.device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=frozen if args.lora else torch.float32)
        if args.lora:
            self.model = add_lora(self.model, Lora(r=32, alpha=16), "base")
            self.base = ReferenceModel(self.model)
        else:
            with self.device:
                copy = AutoModelForCausalLM.from_config(config, dtype=frozen or torch.float32)
            copy.load_state_dict(self.model.state_dict())
            with torch.no_grad():  # away from the base, so that PD has something to measure
                for parameter in self.model.parameters():
                    parameter.add_(1e-3 * torch.randn_like(parameter))
            self.base = ReferenceModel(copy, "fp32" if half else args.precision)
        self.model.train()
        self.objectives = {name: Objective(self.model, weights, self.base) for name, (weights, _) in OURS.items()}
        self.landings = {name: LandingPoint(self.model, self.base, OURS[name][1]) for name in LANDING}

    def texts(self, step: int) -> tuple[list[Pair], list[str], list[Pair], list[Pair]]:
        """Harmful pairs, random answers, normal texts and safe answers: words drawn at random, lengths log-normal."""
        draw = np.random.default_rng([1, step])

        def words(mean: float) -> str:
            spread = self.args.spread
            length = int(np.clip(mean * np.exp(draw.normal(-(spread**2) / 2, spread)), 4, LONGEST))
            return " ".join(f"w{word}" for word in draw.integers(100, self.vocabulary - 100, length))

        args = self.args
        pairs = [Pair(words(args.question_tokens), words(args.answer_tokens)) for _ in range(args.batch_size)]
        answers = [words(args.answer_tokens) for _ in range(args.k_random)]
        normal = [Pair(words(15), words(15)) for _ in range(args.batch_size)]
        return pairs, answers, normal, [Pair(pair.question, words(30)) for pair in pairs]

    def run(self, name: str, texts: tuple) -> tuple[float, dict[str, float]]:
        """Seconds of one step in one of the WAYS, and its losses."""
        self.model.zero_grad()
        synchronize(self.device)
        started = time.perf_counter()
        autocast = self.args.precision == "bf16" and name != "released"
        parts, values = WAYS[name](self, *texts), {}
        while True:
            with torch.autocast(self.device.type, torch.bfloat16) if autocast else nullcontext():
                part = next(parts, None)
            if part is None:
                break
            part[0].backward()
            values |= part[1]
        synchronize(self.device)
        seconds = time.perf_counter() - started
        return seconds, {loss: value.item() for loss, value in values.items()}

    def own_process(self, name: str) -> dict:
        """What `peak_memory` measures in a fresh process."""
        command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, so that texts have the lengths that they are drawn with. Adds BOS."""
    words = {"<pad>": 1, "<s>": 2, "<unk>": 3, "###": 4, "Question:": 5, "Answer:": 6}
    words |= {f"w{index}": index for index in range(100, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


# --- The released computation, straightforwardly: all rows padded together, all logits, one row after another -----


def released(setting: Setting, pairs: list[Pair], answers: list[str], normal: list[Pair], _safe: list[Pair]):
    """GD, RD and PD as implementation details 3 and 9 to 12 describe them."""
    model, tokenizer, device = setting.model, setting.tokenizer, setting.device

    def padded(texts: list[Pair]) -> dict:
        written = [format_pair(text.question, text.answer) for text in texts]
        return tokenizer(written, padding=True, return_tensors="pt").to(device)

    def answer_loss(texts: list[Pair], starts: list[int]):
        rows = padded(texts)
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.float()
        losses = []
        for row, start in enumerate(starts):
            ids = rows["input_ids"][row]
            pad = tokenizer.pad_token_id
            entropies = F.cross_entropy(logits[row, :-1], ids[1:], reduction="none", ignore_index=pad)
            weight = torch.zeros(len(ids), device=device)
            weight[start:] = 1
            weight[ids == pad] = 0
            weight /= weight.sum()
            losses.append((weight[:-1] * entropies).sum())
        return torch.stack(losses).mean()

    gd = answer_loss(pairs, [len(tokenizer(format_prefix(pair.question))["input_ids"]) - 1 for pair in pairs])
    random = [Pair(pair.question, answer) for pair in pairs for answer in answers]
    rd = answer_loss(random, [2] * len(random))
    rows = padded(normal)
    inputs = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    q = model(**inputs).logits.float().softmax(-1)
    with torch.no_grad(), setting.base.active() as base:
        p = base(**inputs).logits.float().softmax(-1)
    pd = -(p * ((p + 1e-12) / q).log()).sum(-1).mean()
    values = {"gd": gd, "rd": rd, "pd": pd}
    yield sum(WEIGHTS[name] * loss for name, loss in values.items()), values


def ours(objective: str, packed_up_to: float = math.inf):
    """Our step, in plain rows (0) or packed (infinity), tokenisation included."""
    weights, _ = OURS[objective]

    def step(setting: Setting, pairs: list[Pair], answers: list[str], normal: list[Pair], safe: list[Pair]):
        collator = setting.collator
        harmful = collator.answers_batch(pairs, answers if "rd" in weights else [], packed_up_to=packed_up_to)
        texts = [harmful, collator.texts_batch(normal), collator.answers_batch(safe, []) if "sa" in weights else None]
        texts = StepBatch(*(batch and batch.to(setting.device) for batch in texts))
        terms = setting.objectives[objective]
        yield terms(setting.model, texts)
        if objective in LANDING:
            with setting.landings[objective].reached() as chain_rule:
                loss, values = terms.at_landing(setting.model, texts)
                yield chain_rule * loss, values

    return step


WAYS = {"released": released, "plain rows": ours("packed", 0), **{name: ours(name) for name in OURS}}
LANDING = {*OURS} - {"packed"}


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(args: argparse.Namespace) -> dict:
    """Bytes above both models' weights at the peak of three steps: gradients, activations, logits."""
    setting = Setting(args)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resident()
    for step in range(3):
        setting.run(args.memory_of, setting.texts(step))
    peak = torch.cuda.max_memory_allocated() if setting.device.type == "cuda" else high_water()
    return {"above": peak - before, "in all": peak}


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def high_water() -> int:
    """Bytes of this process in memory at its peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def report(setting: Setting, times: dict[str, list[float]], memory: dict[str, dict]) -> str:
    """The table: medians, ratios of medians, tokens, and the share of the machine's own matrix product."""
    args = setting.args
    texts = [setting.texts(step) for step in range(args.repeat)]
    collator = setting.collator
    layouts = {"plain rows": 0, "packed": math.inf}
    computed, needed = {}, None
    for name, up_to in layouts.items():
        batches = [(collator.answers_batch(p, a, packed_up_to=up_to), collator.texts_batch(n)) for p, a, n, _ in texts]
        computed[name] = statistics.mean(h.input_ids.numel() + n.input_ids.numel() for h, n in batches)
        scored = statistics.mean(len(h.row) + len(n.row) for h, n in batches)
        if name == "packed":
            needed = statistics.mean(h.tokens + n.tokens for h, n in batches)
            needed_scored = scored
    computed["released"] = computed["plain rows"]
    head = setting.vocabulary * setting.model.get_output_embeddings().weight.shape[1]
    body = sum(p.numel() for n, p in setting.model.named_parameters() if "embed" not in n and "lm_head" not in n)
    products = 4 if args.lora else 6  # 2 forward, 2 backward for activations, 2 for weights; without attention's own
    flops = products * (needed * body + needed_scored * head)
    peak = matmul_peak(setting)
    lines = [
        f"{args.precision}, {setting.device.type}, {torch.get_num_threads()} threads; batch {args.batch_size}, "
        f"K {args.k_random}, answers of {args.answer_tokens:g} tokens on average (spread {args.spread:g}); "
        f"medians of {args.repeat} steps",
        f"tokens needed (each question once): {needed:.0f} a step; measured matrix product: {peak / 1e9:.0f} GFLOP/s",
        "",
        f"| step | seconds | of {args.ways[0]} | peak above weights, MiB | of {args.ways[0]} | tokens computed "
        "| of peak FLOP/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = statistics.median(times[args.ways[0]])
    for name in args.ways:
        seconds = statistics.median(times[name])
        tokens, share = "–", "–"
        if name not in LANDING:
            tokens, share = f"{computed[name]:.0f}", f"{flops / seconds / peak:.0%}"
        above = memory[name]["above"]
        lines.append(
            f"| {name} | {seconds:.3f} | 1/{first / seconds:.2f} | {above / 2**20:.0f} | "
            f"1/{memory[args.ways[0]]['above'] / above:.2f} | {tokens} | {share} |"
        )
    return "\n".join(lines)


def matmul_peak(setting: Setting) -> float:
    """FLOP/s of the machine's best large matrix product in this precision."""
    size = 8192 if setting.device.type == "cuda" else 2048
    dtype = torch.bfloat16 if setting.args.precision == "bf16" else torch.float32
    matrix = torch.randn(size, size, device=setting.device, dtype=dtype)
    seconds = []
    for _ in range(6):
        synchronize(setting.device)
        started = time.perf_counter()
        matrix @ matrix
        synchronize(setting.device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def parse_flags() -> argparse.Namespace:
    """The flags."""
    title, _, usage = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hidden", type=int, default=256, help="OPT's hidden size (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=50272, help="(default: %(default)s)")
    parser.add_argument("--model", help="take the shape from this model's config.json instead (hub id or folder)")
    parser.add_argument("--lora", action="store_true", help="train an adapter (r 32, q_proj and v_proj)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--k_random", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--question_tokens", type=float, default=18, help="on average (default: %(default)s)")
    parser.add_argument("--answer_tokens", type=float, default=75, help="on average (default: %(default)s)")
    parser.add_argument(
        "--spread",
        type=float,
        default=0.6,
        help="of lengths: standard deviation of their logarithm (default: %(default)s)",
    )
    parser.add_argument("--repeat", type=int, default=7, help="steps of each (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=["released", "plain rows", "packed"],
        help="(default: released, plain rows and packed)",
    )
    parser.add_argument("--memory_of", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
