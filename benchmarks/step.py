"""One stage 1 step of SKU, forward and backward: the released computation, ours in plain rows, ours packed.

    python benchmarks/step.py
    python benchmarks/step.py --hidden 512 --layers 8 --precision bf16
    python benchmarks/step.py --ways packed "at the landing point" lands --lora    # what landing costs
    python benchmarks/step.py --model FOLDER --harmful_dataset pku.parquet --precision bf16    # your own model and data

By default random weights of an OPT of that shape (or of --config's) and random words. With --model its weights and its
tokenizer; with --harmful_dataset and --normal_dataset the rows of a real run's first steps. The released computation
is in float32, as the authors' runs were; --precision is that of the others. There is no dropout, and no optimizer. All
ways run in turn in one process, so that a noisy machine is noisy for all; the machine's own rate, of a large matrix
product, is measured between the steps. Peak memory is each one's own, in a process of its own. The losses must agree,
or no figure is printed. The released way keeps the logits of all positions in float32, several times: gigabytes on the
rows of a real run, and over 12 GB where the vocabulary has 262,000 tokens (leave it out with --ways).
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging

from benchmarks import made_up, measuring
from benchmarks.released import WEIGHTS, released
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch, StepBatches, run_sampler
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.landing import LandingPoint
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.losses.packing_check import max_packed_length
from harmful_unlearn.losses.terms import reads
from harmful_unlearn.models.loading import context_length, load_config, load_model, load_tokenizer
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.models.precision import computing_in
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.storage.files import user_path
from harmful_unlearn.training.setup import default_tokens_per_pass

RELEASED = "released"
WAYS: dict[str, tuple[dict[str, float], float]] = {  # the weights of the losses, and the landing point's alpha
    RELEASED: (WEIGHTS, 1.0),
    "plain rows": (WEIGHTS, 1.0),
    "packed": (WEIGHTS, 1.0),
    "at the landing point": ({"gd": 2.5, "rd": 2.5, "lp": 1.0}, 3.0),  # the same batch with PD there
    "lands": ({"gd": 1.0, "lp": 0.3, "sa": 0.1}, 4.0),  # --method lands
}
LANDING = {"at the landing point", "lands"}
AWAY = 1e-3  # theta is so far from the base, so that PD has something to measure


def main() -> None:
    """Measure and print the tables. Raises UserError: flags that do not fit, losses that differ."""
    args = parse_flags()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.memory_of:
        args.ways = [args.memory_of]
        print(json.dumps(peak_above_weights(Setting(args))))
        return
    setting = Setting(args)
    check_losses({name: setting.run(name, args.repeat) for name in args.ways}, args.precision)  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in args.ways}
    rates: dict[str, list[float]] = {precision: [] for precision in setting.precisions}
    for step in tqdm(range(args.repeat), "steps", unit="step", disable=None):
        for name in args.ways:
            times[name].append(setting.seconds(name, step))
        for precision in rates:
            rates[precision].append(measuring.matmul_rate(setting.device, precision))
    profiles = {name: setting.profiled(name) for name in args.ways}
    memory = {name: of_own_process(name) for name in args.ways}
    print(report(setting, times, {key: statistics.median(rate) for key, rate in rates.items()}, profiles, memory))


class Trained:
    """theta, and theta_o, from which it is AWAY, in a precision."""

    def __init__(self, load: Callable[[torch.dtype], PreTrainedModel], precision: str, lora: bool, exact_base: bool):
        """`exact_base`: theta_o is in float32, as a landing point needs it."""
        self.precision = precision
        frozen = measuring.DTYPES[precision]
        self.model = load(frozen if lora else torch.float32)
        if lora:
            torch.manual_seed(1)
            self.model = add_lora(self.model, Lora(r=32, alpha=16), "base")
            self.base = ReferenceModel(self.model)
        else:
            self.base = ReferenceModel(load(torch.float32 if exact_base else frozen), precision)
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        torch.manual_seed(2)
        with torch.no_grad():
            for weight in self.weights:
                weight.add_(AWAY * torch.randn_like(weight))
        self.model.eval()  # without dropout
        self._gradients: list[torch.Tensor] = []

    def forget_gradients(self, keep: bool) -> None:
        """Before a step: the gradients are zero, in the memory that they have (`keep`), or there are none."""
        if keep and not self._gradients:
            self._gradients = [torch.zeros_like(weight) for weight in self.weights]
        for at, weight in enumerate(self.weights):
            weight.grad = self._gradients[at].zero_() if keep else None


class Setting:
    """Models, tokenizer and rows of a run."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self._folder = user_path(args.model) if args.model else None
        if self._folder:
            self.config = load_config(self._folder)
        elif args.config:
            self.config = AutoConfig.from_pretrained(args.config, trust_remote_code=False)
        else:
            self.config = made_up.opt_config(args.hidden, args.layers, args.vocabulary)
        self.vocabulary = self.config.get_text_config().vocab_size
        if args.harmful_dataset and not (args.model or args.config):
            raise UserError("--harmful_dataset needs a tokenizer: give --model FOLDER, or --config FOLDER with one")
        if self._folder or args.harmful_dataset:
            self.tokenizer = load_tokenizer(self._folder or Path(args.config), self.config)
        else:
            self.tokenizer = made_up.word_tokenizer(self.vocabulary)
        self._harmful, self._normal = made_up.data(
            self.tokenizer, args.question_tokens, args.answer_tokens, args.spread
        )
        if args.harmful_dataset:
            self._harmful = read_harmful(args.harmful_dataset)
        if args.normal_dataset:
            self._normal = read_normal(args.normal_dataset, args.seed)
        self.collator = Collator(ReleasedTemplate(self.tokenizer), "released", context_length(self.config))
        exact_base = bool(LANDING & {*args.ways})
        self._trained = {p: Trained(self._load, p, args.lora, exact_base) for p in sorted(self.precisions)}
        # Switches tree attention on, as a run does.
        self.packed_up_to, self.why_plain = math.inf, ""
        for trained in self._trained.values():
            self.packed_up_to, self.why_plain = max_packed_length(trained.model, self.collator)
        self.batches = {name: self._batches(name) for name in (*args.ways, "packed")}
        self._objectives = {
            name: Objective(self.trained(name).model, WAYS[name][0], self.trained(name).base) for name in args.ways
        }
        self._landings = {
            name: LandingPoint(self.trained(name).model, self.trained(name).base, WAYS[name][1])
            for name in args.ways
            if name in LANDING
        }

    @property
    def precisions(self) -> set[str]:
        """Those that are needed: "fp32" for the released way, and the flag's for ours."""
        return {"fp32" if name == RELEASED else self.args.precision for name in self.args.ways}

    def trained(self, name: str) -> Trained:
        """What one of WAYS trains."""
        return self._trained["fp32" if name == RELEASED else self.args.precision]

    def passes(self, name: str, step: int) -> list[StepBatch]:
        """The passes of a step."""
        return self.batches[name](step, self.device)

    def run(self, name: str, step: int) -> dict[str, float]:
        """One step in one of WAYS, tokenisation included; the losses, in nats."""
        trained = self.trained(name)
        if name == RELEASED:
            loss, values = released(trained.model, trained.base, self.collator, *self._texts(step))
            loss.backward()
            return {key: value.item() for key, value in values.items()}
        objective, passes, values = self._objectives[name], self.passes(name, step), {}
        backward(trained.model, objective, passes, trained.precision, values)
        if name in LANDING:
            with self._landings[name].reached() as chain_rule:
                backward(trained.model, objective.at_landing, passes, trained.precision, values, chain_rule)
        return {key: value.item() for key, value in values.items()}

    def seconds(self, name: str, step: int) -> float:
        """Seconds of a step."""
        self.trained(name).forget_gradients(keep=name != RELEASED)
        return measuring.seconds_of(lambda: self.run(name, step), self.device)

    def profiled(self, name: str) -> dict[str, float]:
        """The share of each kind of work in a step."""
        self.trained(name).forget_gradients(keep=name != RELEASED)
        return measuring.where_time_goes(lambda: self.run(name, 0), self.device, self.vocabulary)

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        if self._folder:
            return load_model(self._folder, dtype).to(self.device)
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).to(dtype)

    def _batches(self, name: str) -> StepBatches:
        args, needed = self.args, reads(WAYS[name][0])
        sampler = run_sampler(vars(args), 1, self._harmful, self._normal, needed)
        packed_up_to = 0 if name == "plain rows" else self.packed_up_to
        limit = args.tokens_per_pass or default_tokens_per_pass(self.device)
        return StepBatches(self.collator, sampler, self._harmful, self._normal, needed, packed_up_to, limit)

    def _texts(self, step: int) -> tuple[list[Pair], list[str], list[Pair]]:
        """A step's harmful pairs, random answers and normal texts."""
        batches = self.batches[RELEASED]
        rows = batches.sampler[step]
        pairs = [self._harmful.pairs[row] for row in rows.harmful_rows]
        answers = [batches.pool[row] for row in rows.answer_rows]
        return pairs, answers, [self._normal.texts[row] for row in rows.normal_rows]


def backward(
    model: PreTrainedModel,
    objective: Callable,
    passes: list[StepBatch],
    precision: str,
    values: dict[str, torch.Tensor],
    factor: float = 1.0,
) -> None:
    """The gradient of factor * objective over the passes of a step, as a run computes it; losses go to `values`."""
    with computing_in(precision, model):
        for batch in passes:
            loss, terms = objective(model, batch)
            if loss.requires_grad:
                (factor * loss).backward()
            for name, value in terms.items():
                values[name] = values.get(name, 0.0) + value


# --- The report ---------------------------------------------------------------------------------------------------


def check_losses(losses: dict[str, dict[str, float]], precision: str) -> None:
    """Raises UserError where two ways compute different losses."""
    close = 1e-3 if precision == "fp32" else 3e-2
    first, *others = losses.values()
    pairs = [(first[loss], value) for other in others for loss, value in other.items() if loss in first]
    if not all(abs(expected - value) <= close * max(1, abs(expected)) for expected, value in pairs):
        raise UserError(f"the losses differ, so no time is worth printing: {losses}")


def peak_above_weights(setting: Setting) -> int:
    """Bytes above all weights at the peak of three steps: gradients, activations, logits."""
    measuring.forget_peak(setting.device)
    before = measuring.in_memory(setting.device)
    (name,) = setting.args.ways
    for step in range(3):
        setting.seconds(name, step)
    return measuring.peak_memory(setting.device) - before


def of_own_process(name: str) -> int:
    """What `peak_above_weights` measures in a fresh process."""
    words = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
    return int(measuring.watched(words, "VmHWM", every=0.1)[2].splitlines()[-1])


def report(
    setting: Setting,
    times: dict[str, list[float]],
    rates: dict[str, float],
    profiles: dict[str, dict[str, float]],
    memory: dict[str, int],
) -> str:
    """The tables: medians, ratios, the share of the machine's own rate, and where the time of a step goes."""
    args, ways, steps = setting.args, setting.args.ways, range(setting.args.repeat)
    first, first_memory = statistics.median(times[ways[0]]), memory[ways[0]]
    rows = []
    for name in ways:
        seconds, trained = statistics.median(times[name]), setting.trained(name)
        needed_as = "packed" if name in (RELEASED, "plain rows") else name
        needed = [
            measuring.needed_flops(trained.model, setting.passes(needed_as, step), WAYS[name][0]) for step in steps
        ]
        share = statistics.median(flops / spent for flops, spent in zip(needed, times[name], strict=True))
        rate = rates[trained.precision]
        of_first = f"1/{first / seconds:.2f}"
        of_memory = f"1/{first_memory / memory[name]:.2f}"
        above = f"{memory[name] / measuring.MIB:.0f}"
        rows.append([name, trained.precision, f"{seconds:.3f}", of_first, f"{share / rate:.0%}", above, of_memory])
    tokens = [sum(rows.tokens for part in setting.passes("packed", s) for rows in part if rows) for s in steps]
    header = ["step", "precision", "seconds", f"of {ways[0]}", "of the machine's rate"]
    header += ["peak above weights, MiB", f"of {ways[0]}"]
    shares = [[name, *(f"{profiles[name][kind]:.0%}" for kind in measuring.KINDS)] for name in ways]
    threads = torch.get_num_threads()
    where = "" if setting.device.type == "cuda" else f", {threads} thread{'s' * (threads > 1)}"
    data = setting.batches["packed"].harmful.source["name"]
    lines = [
        f"{Path(args.model).name if args.model else setting.config.model_type}, "
        f"{'LoRA' if args.lora else 'every weight'}, {setting.device.type}{where}; batch {args.batch_size}, "
        f"K {args.k_random}, {Path(data).name}; medians of {args.repeat} steps",
        f"tokens needed (each question once): {statistics.mean(tokens):.0f} a step; the machine's own rate: "
        + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in sorted(rates.items())),
    ]
    if setting.why_plain:
        length = setting.packed_up_to
        lines.append(f"{f'texts over {length} tokens' if length else 'all texts'} in plain rows: {setting.why_plain}")
    title = "Where a step goes, in percent of its operations' own time (of a run under the profiler):"
    return "\n".join([*lines, "", measuring.table(header, rows), "", title, "",
                      measuring.table(["step", *measuring.KINDS], shares)])  # fmt: skip


def parse_flags() -> argparse.Namespace:
    """The flags."""
    title, _, usage = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    made_up.add_shape(parser)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--model", help="this folder's weights and tokenizer instead")
    shape.add_argument("--config", help="random weights of the shape in this model's config.json (hub id or folder)")
    add("--harmful_dataset", help="PKU-SafeRLHF, or a file with its columns (default: random words)")
    add("--normal_dataset", help="TruthfulQA.csv, or a file with its columns (default: random words)")
    add("--lora", action="store_true", help="train an adapter (r 32, q_proj and v_proj)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of our ways (default: %(default)s)")
    add("--tokens_per_pass", type=int, help="as in a run (default: a run's)")
    add("--batch_size", type=int, default=2, help="(default: %(default)s)")
    add("--k_random", type=int, default=5, help="(default: %(default)s)")
    add("--seed", type=int, default=8888, help="of the rows (default: %(default)s)")
    add("--question_tokens", type=float, default=made_up.QUESTION, help="on average (default: %(default)s)")
    add("--answer_tokens", type=float, default=made_up.ANSWER, help="on average (default: %(default)s)")
    spread = "of lengths: standard deviation of their logarithm (default: %(default)s)"
    add("--spread", type=float, default=made_up.SPREAD, help=spread)
    add("--repeat", type=int, default=7, help="steps of each (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ways = [RELEASED, "plain rows", "packed"]
    add("--ways", nargs="+", choices=WAYS, default=ways, help="(default: released, plain rows and packed)")
    add("--memory_of", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main))
