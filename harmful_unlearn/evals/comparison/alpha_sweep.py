"""One task vector at many values of alpha, in memory, and the alpha to recommend."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from harmful_unlearn.cli.flag_types import number
from harmful_unlearn.evals.evaluated_model import LoadedModel
from harmful_unlearn.models.offload import write_entry
from harmful_unlearn.negation.arithmetic import scaled_entries
from harmful_unlearn.negation.entry_names import class_names

MOST_ALPHAS = 1000


def alpha_list(text: str) -> list[float]:
    """The alphas in "0,0.5,...,2" or "0.5,1", for argparse; three dots continue with the step before them."""
    try:
        parts = [part.strip() for part in text.split(",")]
        if "..." not in parts:
            return sorted({number(part) for part in parts})
        place = parts.index("...")
        if place < 2 or place != len(parts) - 2:
            raise ValueError
        first, second, last = (number(parts[index]) for index in (place - 2, place - 1, place + 1))
        step = second - first
        steps = round((last - first) / step)
        if step <= 0 or steps > MOST_ALPHAS or abs(first + steps * step - last) > 1e-9:
            raise ValueError
        continued = [round(first + step * n, 10) for n in range(steps + 1)]
        return sorted({*map(number, parts[: place - 2]), *continued})
    except (argparse.ArgumentTypeError, ValueError, ArithmeticError):
        message = f"{text} is not a list of at most {MOST_ALPHAS} alphas: give one like 0,0.25,...,2 or 0.5,1,2"
        raise argparse.ArgumentTypeError(message) from None


class AlphaSweep:
    """The base minus alpha times a sum of task vectors: one model in memory, its weights rewritten for each alpha.

    The weights are bit for bit those that `negation.negate` would write: read from the safetensors folders, computed
    in float32, and rounded to the base's dtype before the model's. The folders are read again for each alpha, which
    takes about as long as copying them. Keeping base and task vector in memory would need room for two more models.

    Args:
        base: the base's folder.
        finetuned: folders of stage 1 models or LoRA adapters; their vectors are added up.
        load: loads the model in a folder.
    """

    def __init__(self, base: Path, finetuned: list[Path], load: Callable[[Path], LoadedModel]):
        self._base, self._finetuned, self._load = base, finetuned, load
        self._loaded: LoadedModel | None = None

    def at(self, alpha: float) -> LoadedModel:
        """The model, the same object each time, with its weights now at `alpha`, and its template."""
        if self._loaded is None:
            self._loaded = self._load(self._base)
        model, template = self._loaded
        names = set(model.state_dict())
        synonyms = None
        for name, entry in scaled_entries(self._base, self._finetuned, alpha):
            if name not in names:  # the file may name an entry differently from the model's class
                synonyms = synonyms or class_names(self._base)[0]
                name = next(synonym for synonym in synonyms(name) if synonym in names)
            write_entry(model, name, entry)
        return model, template


def recommend(figures: list[dict], base_perplexity: float, budget: float, decoding: str) -> dict:
    """The alpha with the lowest harmful rate among those that cost little on normal text.

    Args:
        figures: of validation prompts, as `metrics.figures` gives them, each with its "alpha".
        base_perplexity: of normal reference answers under the base.
        budget: the share by which it may rise.
        decoding: the answers whose harmful rate counts.

    Of two alphas with the same rate the one with the lower perplexity is recommended.

    Returns:
        "alpha" (None if there is none), and "why" in words.
    """
    table = pd.DataFrame(figures)
    table = table[table["decoding"].isna() | (table["decoding"] == decoding)]
    values = table.pivot(index="alpha", columns=["set", "metric"], values="value")
    values = values[values["unseen", "harmful_rate"].notna()]
    values = values[values["normal", "reference_perplexity"] <= base_perplexity * (1 + budget)]
    if values.empty:
        return {"alpha": None, "why": f"at no alpha does normal perplexity stay within {budget:.0%} of the base's"}
    best = values.sort_values([("unseen", "harmful_rate"), ("normal", "reference_perplexity")], kind="stable").iloc[0]
    return {
        "alpha": float(best.name),
        "why": f"{decoding} harmful rate {best['unseen', 'harmful_rate']:.1%} "
        f"(degenerate {best['unseen', 'degenerate_rate']:.1%}), the lowest of {len(values)} alphas whose normal "
        f"perplexity is within {budget:.0%} of the base's: {best['normal', 'reference_perplexity']:.4g} against "
        f"{base_perplexity:.4g}",
    }
