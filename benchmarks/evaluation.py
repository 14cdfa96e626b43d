"""Answering prompts and scoring reference answers: ours, against transformers' own way in batches of rows.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --model FOLDER --harmful_dataset pku.parquet --precision bf16
    python benchmarks/evaluation.py --tokens_per_batch 4096 --repeat 1

The other way is `model.generate` in batches of 16 prompts padded together, and for scoring the logits of all positions
of 16 padded texts. Both run in turn in one process. By default a random OPT and random words; a random model hardly
ever ends an answer. Greedy answers and scores must be equal in float32, or no time is printed. Tokens are those of the
answers; the share of the machine's rate counts the matrix products that ours computes. "Choices" are CHOICES answers to
each of a few of the prompts, as TruthfulQA has them.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging

from benchmarks import made_up, measuring
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.prompt_format import NEXT_QUESTION, Asked, Pair
from harmful_unlearn.data.templates import ReleasedTemplate, Template
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.inference.generation import TOKENS_PER_BATCH, Decoding, Request, configure, generate
from harmful_unlearn.evals.inference.likelihood import answer_nll
from harmful_unlearn.models.loading import context_length, load_config, load_model, load_tokenizer
from harmful_unlearn.storage.files import user_path

ROWS = 16  # in a batch of transformers' way
CHOICES = 8
DECODINGS = {"greedy": Decoding(), "sampled": Decoding(temperature=1.0)}
OURS, THEIRS = "ours", f"transformers, {ROWS} rows"


def main() -> None:
    """Measure and print the table. Raises UserError: the two ways differ."""
    args = parse_flags()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = torch.device(args.device)
    template, pairs = read(args)
    model = load(args, "fp32")
    check_equal(model, template, pairs, args.max_new_tokens, args.tokens_per_batch)
    if args.precision != "fp32":
        del model
        model = load(args, args.precision)
    works = works_of(model, template, pairs, args.max_new_tokens, args.tokens_per_batch)
    rates = []
    for _ in range(args.repeat):
        for work in works.values():
            work.run(device)
        rates.append(measuring.matmul_rate(device, args.precision))
    threads = torch.get_num_threads()
    where = "" if device.type == "cuda" else f", {threads} thread{'s' * (threads > 1)}"
    print(
        f"{Path(args.model).name if args.model else 'random ' + model.config.model_type}, {args.precision}, "
        f"{device.type}{where}; {len(pairs)} prompts, at most {args.max_new_tokens} new tokens, "
        f"{args.tokens_per_batch} tokens a batch; medians of {args.repeat}; the machine's own rate: "
        f"{statistics.median(rates) / 1e9:.0f} GFLOP/s\n\n{report(works, statistics.median(rates))}\n\n"
        f"Where the time of ours goes, in percent (of a run under the profiler):\n\n"
        f"{where_ours_goes(works, device, model.config.get_text_config().vocab_size)}"
    )


class Work:
    """Something to time: `do(what)` returns how many tokens it made or scored."""

    def __init__(self, do: Callable[[Any], int], what: object):
        self._do, self._what = do, what
        self.seconds: list[float] = []
        self.tokens = 0

    def run(self, device: torch.device) -> None:
        """Once."""

        self.seconds.append(measuring.seconds_of(self.again, device))

    def again(self) -> None:
        """Once, without taking the time."""
        self.tokens = self._do(self._what)


def works_of(
    model: PreTrainedModel, template: Template, pairs: list[Pair], max_new_tokens: int, tokens_per_batch: int
) -> dict[tuple[str, str], Work]:
    """What is timed: by work ("greedy", "sampled", "scoring", "choices") and way."""
    limits = (max_new_tokens, tokens_per_batch)

    def tokens(texts: list[str]) -> int:
        return sum(map(len, template.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    works = {}
    for name, decoding in DECODINGS.items():
        works[name, OURS] = Work(lambda d: tokens(answers(model, template, pairs, d, *limits)), decoding)
        works[name, THEIRS] = Work(lambda d: tokens(their_answers(model, template, pairs, d, limits[0])), decoding)
    for name, scored in (("scoring", pairs), ("choices", choices_of(pairs))):
        works[name, OURS] = Work(lambda p: sum(count for _, count in scores(model, template, p)), scored)
        works[name, THEIRS] = Work(lambda p: sum(count for _, count in their_scores(model, template, p)), scored)
    return works


def report(works: dict[tuple[str, str], Work], machine_rate: float) -> str:
    """The table: medians, ratios to transformers' way of the same work, and the share of the machine's own rate."""
    rows = []
    needed = {name: measuring.computed_flops(work.again) for (name, way), work in works.items() if way == OURS}
    for (name, way), work in works.items():
        seconds = statistics.median(work.seconds)
        other = works[name, THEIRS]
        rate, their_rate = work.tokens / seconds, other.tokens / statistics.median(other.seconds)
        ratio = f"{rate / their_rate:.2f}" if their_rate else "–"
        share = f"{needed[name] / seconds / machine_rate:.0%}"
        rows.append([name, way, f"{seconds:.2f}", work.tokens, f"{rate:.0f}", ratio, share])
    header = ["work", "way", "seconds", "tokens", "tokens a second", f"of {THEIRS}", "of the machine's rate"]
    return measuring.table(header, rows)


def where_ours_goes(works: dict[tuple[str, str], Work], device: torch.device, vocabulary: int) -> str:
    """A table: the share of each kind of operation in our way of each work."""
    rows = []
    for (name, way), work in works.items():
        if way == OURS:
            shares = measuring.where_time_goes(work.again, device, vocabulary)
            rows.append([name, *(f"{shares[kind]:.0%}" for kind in measuring.KINDS)])
    return measuring.table(["work", *measuring.KINDS], rows)


def check_equal(
    model: PreTrainedModel, template: Template, pairs: list[Pair], max_new_tokens: int, tokens_per_batch: int
) -> None:
    """Raises UserError where greedy answers or scores of the two ways differ; the model is in float32."""
    greedy = DECODINGS["greedy"]
    ours = answers(model, template, pairs, greedy, max_new_tokens, tokens_per_batch)
    theirs = their_answers(model, template, pairs, greedy, max_new_tokens)
    different = sum(one != other for one, other in zip(ours, theirs, strict=True))
    if different:
        raise UserError(f"{different} of {len(pairs)} greedy answers differ, so no time is worth printing")
    scored = pairs + choices_of(pairs)
    both = zip(scores(model, template, scored), their_scores(model, template, scored), strict=True)
    wrong = [(one, other) for one, other in both if one[1] != other[1] or abs(one[0] - other[0]) > 1e-3 * one[1]]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(scored)} scores differ, so no time is worth printing: {wrong[0]}")


def answers(
    model: PreTrainedModel,
    template: Template,
    pairs: list[Pair],
    decoding: Decoding,
    max_new_tokens: int,
    tokens_per_batch: int,
) -> list[str]:
    """Ours."""
    requests = [Request(Asked(pair.question), decoding, (1, index)) for index, pair in enumerate(pairs)]
    made = [
        answer for batch in generate(model, template, max_new_tokens, tokens_per_batch, requests) for answer in batch
    ]
    return [answer.text for answer in sorted(made, key=lambda answer: answer.index)]


@torch.inference_mode()
def their_answers(
    model: PreTrainedModel, template: Template, pairs: list[Pair], decoding: Decoding, max_new_tokens: int
) -> list[str]:
    """Those of `model.generate`, long prompts first, in batches of ROWS."""
    published = model.generation_config
    tokenizer = template.tokenizer
    configure(model, tokenizer, decoding, max_new_tokens=max_new_tokens)
    prompts = template.prompts([pair.question for pair in pairs])
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    made = [""] * len(prompts)
    for start in range(0, len(order), ROWS):
        indices = order[start : start + ROWS]
        ids = {"input_ids": [prompts[i] for i in indices]}
        rows = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
        generated = model.generate(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for index, row in zip(indices, generated[:, rows["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in ends), None)
            made[index] = tokenizer.decode(row[:end], skip_special_tokens=True).partition(NEXT_QUESTION)[0].strip()
    model.generation_config = published
    return made


def scores(model: PreTrainedModel, template: Template, pairs: list[Pair]) -> list[tuple[float, int]]:
    """The cross-entropy of each pair's answer, in nats, and its number of tokens; ours."""
    collator = Collator(template, "paper", context_length(model.config))
    return answer_nll(model, collator, pairs, "")


@torch.inference_mode()
def their_scores(model: PreTrainedModel, template: Template, pairs: list[Pair]) -> list[tuple[float, int]]:
    """The same from all logits of padded rows, ROWS at a time, in the order of the pairs."""
    texts = Collator(template, "paper", context_length(model.config)).encode(pairs)
    scored = []
    for start in range(0, len(texts), ROWS):
        part = texts[start : start + ROWS]
        longest = max(len(text.input_ids) for text in part)
        ids = torch.tensor([text.input_ids + [0] * (longest - len(text.input_ids)) for text in part])
        lengths = torch.tensor([len(text.input_ids) for text in part])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
        entropies = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:].to(model.device), reduction="none")
        for row, text in zip(entropies.double().cpu(), part, strict=True):
            first, last = text.answer_start - 1, len(text.input_ids) - 1
            scored.append((row[first:last].sum().item(), last - first))
    return scored


def choices_of(pairs: list[Pair]) -> list[Pair]:
    """A few of the questions, each with the answers to CHOICES of them."""
    answers = [pair.answer for pair in pairs][:CHOICES]
    return [Pair(pair.question, answer) for pair in pairs[: max(len(pairs) // CHOICES, 1)] for answer in answers]


def read(args: argparse.Namespace) -> tuple[Template, list[Pair]]:
    """The authors' template, and prompts with reference answers."""
    if args.model:
        folder = user_path(args.model)
        tokenizer = load_tokenizer(folder, load_config(folder))
    else:
        tokenizer = made_up.word_tokenizer(args.vocabulary)
    harmful = read_harmful(args.harmful_dataset) if args.harmful_dataset else made_up.data(tokenizer)[0]
    # PKU-SafeRLHF has several answers to a prompt; here every prompt is asked once.
    pairs = list({pair.question: pair for pair in harmful.pairs if pair.answer.strip()}.values())
    return ReleasedTemplate(tokenizer), pairs[: args.prompts]


def load(args: argparse.Namespace, precision: str) -> PreTrainedModel:
    """The model as an evaluation has it."""
    dtype = measuring.DTYPES[precision]
    if args.model:
        return load_model(user_path(args.model), dtype).to(args.device).eval()
    torch.manual_seed(0)
    with torch.device(args.device):
        config = made_up.opt_config(args.hidden, args.layers, args.vocabulary)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()


def parse_flags() -> argparse.Namespace:
    """The flags."""
    title, _, usage = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", help="a folder with a model and its tokenizer (default: a random OPT)")
    made_up.add_shape(parser)
    add("--harmful_dataset", help="PKU-SafeRLHF, or a file with its columns (default: random words)")
    add("--prompts", type=int, default=64, help="(default: %(default)s)")
    add("--max_new_tokens", type=int, default=80, help="(default: %(default)s)")
    add("--tokens_per_batch", type=int, default=TOKENS_PER_BATCH, help="of ours (default: %(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    add("--repeat", type=int, default=3, help="times of each (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main))
