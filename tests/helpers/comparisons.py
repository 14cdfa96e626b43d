"""A made-up comparison for the report's tests, and how they read a report."""

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from harmful_unlearn.reporting.comparison import Comparison

METHODS = {
    "base": ("Original", "main"), "ft": ("FT", "main"), "ga": ("GA", "main"),
    "ga_mismatch": ("GA + mismatch", "main"), "task_vector": ("Task vector", "main"), "sku": ("SKU", "main"),
    "sku-no-gd": ("SKU without GD", "ablation"), "sku-no-rd": ("SKU without RD", "ablation"),
    "sku-no-pd": ("SKU without PD", "ablation"), "sku-pd-turned": ("SKU, PD's sign turned", "ablation"),
    "oracle": ("Oracle", "main"),
}  # fmt: skip
UNTRAINED = ("base", "oracle")
KINDS = ("Economic Crime", "Environmental Damage", "Drugs")
NASTY = "first | line\n<script>alert(1)</script> & `tick` [a](b) $x$"
VERDICTS = ("harmful", "safe", "degenerate", "unjudged", "safe", "answered")


def comparison(seeds=(0, 1, 2), bleurt=True) -> Comparison:
    """Every part, from made-up numbers: the harm rises with a method's place, SKU's is the highest but one.

    In seed s a rate is (place + s) / 40 and the normal perplexity 2 * (1 + place / 4) * (1 + s / 10).
    """
    trained = [name for name in METHODS if name not in UNTRAINED]
    steps = [
        {"step": n, "gd_loss": 3 * 0.99**n, "rd_loss": 4 + math.sin(n), "pd_loss": -n / 90, "total_loss": 7.0, "lr": 1}
        for n in range(1, 201)
    ]
    return Comparison(
        model="tiny/<model> & co",
        seeds=list(seeds),
        command="python reproduce.py --x '$(y)'",
        settings={"temperature": 1.0, "decoding": ["sampled", "greedy"]},
        methods={
            name: {"label": label, "group": group, "command": None if name in UNTRAINED else f"train --{name}"}
            for name, (label, group) in METHODS.items()
        },
        judge={
            "name": "classifier",
            "by_seed": {str(s): {"judge": "classifier", "accuracy": 0.9 + s / 100, "auc": 0.95} for s in seeds},
        },
        figures=[row for seed in seeds for row in prompt_figures(seed, bleurt)],
        attacks=[row for seed in seeds for row in attack_figures(seed)],
        sweep=[row for seed in seeds for row in sweep_figures(seed)],
        recommended=[
            {"seed": seed, "method": method, "alpha": alpha, "budget": 0.1, "why": "because"}
            for seed in seeds
            for method, alpha in (("sku", 0.5), ("task_vector", None))
        ],
        categories=[row for seed in seeds for row in category_figures(seed)],
        oracle=[row for seed in seeds for row in oracle_figures(seed)],
        relearning=[row for seed in seeds for row in relearning_figures(seed)],
        answers=[
            {
                "set": name,
                "prompt": f"{name} {NASTY}",
                "reference": NASTY,
                "answers": {
                    model: {"answer": f"{model}: {NASTY} {'long ' * 60}", "verdict": verdict}
                    for model, verdict in zip(METHODS, VERDICTS, strict=False)
                },
            }
            for name in ("seen", "unseen", "unseen", "normal")
        ],
        losses={name: [{**s, "rd_loss": None} if "rd" in name else s for s in steps] for name in trained},
        provenance={"code": {"commit": "abc"}, "packages": {"torch": "2"}, "created": "now"},
    )


def figure(value: float | None, n: int, **where) -> dict:
    """A figure whose interval is a fifth wide on both sides."""
    low, high = (None, None) if value is None else (0.8 * value, 1.2 * value)
    return {**where, "value": value, "low": low, "high": high, "n": n}


def prompt_figures(seed: int, bleurt: bool) -> Iterator[dict]:
    for place, model in enumerate(METHODS):
        rate, perplexity = (place + seed) / 40, 2 * (1 + place / 4) * (1 + seed / 10)
        broken = model == "ga"
        where = {"seed": seed, "model": model}
        harmful = {
            "harmful_rate": rate,
            "degenerate_rate": 0.5 if broken else 0.01,
            "unjudged_rate": 0.0,
            "refusal_rate": 0.3,
            "answer_perplexity": 10.0 + place + seed,
        }
        normal = {
            "degenerate_rate": 0.02,
            "refusal_rate": rate / 2,
            "answer_perplexity": None if broken else 5.0,
            "exact_match": 1 - rate,
            "rouge_reference": 0.7,
            "rouge_base": 0.8,
        }
        if bleurt:
            normal |= {"bleurt_reference": 0.1, "bleurt_base": -0.2}
        for decoding in ("sampled", "greedy"):
            for name, n, values in (("seen", 200, harmful), ("unseen", 172, harmful), ("normal", 150, normal)):
                for metric, value in values.items():
                    yield figure(value, n, **where, set=name, decoding=decoding, metric=metric)
            for name, metric in (("near, harmless", "refusal_rate"), ("near, harmful", "harmful_rate")):
                yield figure(rate / 4, 100, **where, set=name, decoding=decoding, metric=metric)
        for name, value in (("normal", perplexity), ("seen", 3.0), ("unseen", 4.0)):
            yield figure(value, 150, **where, set=name, decoding=None, metric="reference_perplexity")
        for metric in ("mc1", "mc2"):
            yield figure(0.25, 150, **where, set="normal", decoding=None, metric=metric)


def attack_figures(seed: int) -> Iterator[dict]:
    """Without an attack a rate is (place + s) / 40; "Step 1:" breaks 0.3 more, and long answers 0.1 more."""
    for place, model in enumerate(METHODS):
        for attack, variant, more in (
            ("none", "none", 0), ("prefill", "Sure:", 0.1), ("prefill", "Step 1:", 0.3), ("prefill", "worst", 0.3),
            ("prefill", "any", 0.35), ("long", "400 tokens", 0.1), ("quantize", "4 bits", 0.2), ("any", "any", 0.4),
            ("worst", "worst", 0.3),
        ):  # fmt: skip
            where = {"seed": seed, "model": model, "attack": attack, "variant": variant, "metric": "harmful_rate"}
            yield figure((place + seed) / 40 + more, 100, **where, decoding="sampled", degenerate_rate=0.1, which="")
        where = {"seed": seed, "model": model, "attack": "quantize", "variant": "4 bits", "decoding": None}
        yield figure(3.0 + place + seed, 90, **where, metric="reference_perplexity", degenerate_rate=None, which="")


def sweep_figures(seed: int) -> Iterator[dict]:
    for method in ("sku", "task_vector"):
        for alpha in (0.0, 0.5, 1.0, 1.5, 2.0):
            where = {"seed": seed, "method": method, "model": f"alpha-{alpha:g}", "alpha": alpha}
            effect = alpha + seed / 10
            for name, decoding, metric, value in (
                ("unseen", "sampled", "harmful_rate", math.exp(-effect)),
                ("unseen", "greedy", "harmful_rate", math.exp(-2 * effect)),
                ("unseen", "sampled", "degenerate_rate", alpha / 4),
                ("normal", None, "reference_perplexity", math.exp(effect * effect)),
            ):
                yield figure(value, 60, **where, set=name, decoding=decoding, metric=metric)


def category_figures(seed: int) -> Iterator[dict]:
    for x, vector in enumerate(("base", *KINDS, "sum")):
        for y, kind in enumerate(KINDS):
            where = {"seed": seed, "vector": vector, "category": kind, "metric": "harmful_rate", "decoding": "sampled"}
            yield figure((x + y + seed) / 8, 20 + y, **where)


def relearning_figures(seed: int) -> Iterator[dict]:
    """Before, (place + s) / 40; each step on harmful pairs adds 1/100 to it, on benign text half of that."""
    for place, model in enumerate(METHODS):
        where = {"seed": seed, "model": model, "decoding": "sampled", "metric": "harmful_rate", "pairs": 16, "n": 50}
        for steps in (0, 5, 20):
            harm, benign = ((place + seed) / 40 + steps * speed for speed in (0.01, 0.005))
            of = (
                {"none": ("", harm)}
                if not steps
                else {"full": ("harmful pairs", harm), "lora": ("benign text", benign)}
            )
            for attacker, (text, value) in {**of, "worst": ("", harm)}.items():
                yield figure(value, **where, attacker=attacker, text=text, steps=steps, which="")


def oracle_figures(seed: int) -> Iterator[dict]:
    for place, model in enumerate(METHODS):
        for name in ("unseen", "normal") if model != "oracle" else ():
            where = {"seed": seed, "model": model, "set": name}
            yield figure((place + seed) / 10, 60, **where, decoding=None, metric="oracle_divergence")
            for decoding in ("sampled", "greedy"):
                for metric in ("oracle_kind", "oracle_rouge"):
                    yield figure(0.5, 60, **where, decoding=decoding, metric=metric)


def lean(**changed) -> Comparison:
    """A comparison without the plots that take long."""
    parts = {"losses": {}, "attacks": [], "sweep": [], "categories": [], "oracle": [], "relearning": [], **changed}
    return replace(comparison(), **parts)


def table(folder: Path, name: str) -> dict[str, dict[str, str]]:
    """A CSV by its first column."""
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {next(iter(row.values())): row for row in rows}


def cells(markdown: str, heading: str) -> list[list[str]]:
    """The first table under a heading of report.md, as texts without their links."""
    part = markdown.split(f"\n## {heading}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    lines = [re.sub(r"(?:<a id=[^>]*></a>)?\[(.*?)\]\(#[^)]*\)", r"\1", line) for line in lines]
    return [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines]


def report_text(folder: Path) -> str:
    """report.md."""
    return (folder / "report.md").read_text(encoding="utf-8")
