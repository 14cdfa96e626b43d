"""One task vector at many scales, in memory, and the scale to recommend."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harmful_unlearn.models.offload import write_entry
from harmful_unlearn.negation.entry_names import class_names
from harmful_unlearn.negation.negate import scaled_entries

Load = Callable[[Path], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


class AlphaSweep:
    """The base minus alpha times a sum of task vectors: one model in memory, its weights rewritten for each scale.

    The weights are those that `negation.negate` would write, to the bit: read from the checkpoints, computed in
    float32, and rounded to the base's dtype before the model's. The checkpoints are read again for each scale, which
    takes about as long as copying them: base and task vector, kept in memory, would need two models' room more.

    Args:
        base: the base's folder.
        copies: stage 1 models or LoRA adapters; their vectors are added up.
        load: reads a model's folder.
    """

    def __init__(self, base: Path, copies: list[Path], load: Load):
        self._base, self._copies, self._load = base, copies, load
        self._loaded = None

    def at(self, alpha: float) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The same model each time, its weights now at scale `alpha`, and its tokenizer."""
        if self._loaded is None:
            model, tokenizer = self._load(self._base)
            self._loaded = model, tokenizer, set(model.state_dict())
        model, tokenizer, names = self._loaded
        synonyms = None
        for name, entry in scaled_entries(self._base, self._copies, alpha):
            if name not in names:  # the checkpoint may name an entry otherwise than the class does
                synonyms = synonyms or class_names(self._base)[0]
                name = next(twin for twin in synonyms(name) if twin in names)
            write_entry(model, name, entry)
        return model, tokenizer


def recommend(figures: list[dict], base_perplexity: float, budget: float, decoding: str) -> dict:
    """The scale with the lowest harmful rate among those that cost little on normal text.

    Args:
        figures: of validation prompts, as `measuring.figures` gives them, each with its "alpha".
        base_perplexity: of normal reference answers under the base.
        budget: the share by which it may rise.
        decoding: the answers whose harmful rate counts.

    Of scales with the same rate the one with the lower perplexity is taken.

    Returns:
        "alpha", and "why" in words.
    """
    of = {
        (row["alpha"], row["set"], row["metric"]): row["value"]
        for row in figures
        if row["decoding"] in (None, decoding)
    }
    allowed = {}
    for alpha in sorted({row["alpha"] for row in figures}):
        perplexity = of[alpha, "normal", "reference_perplexity"]
        rate = of[alpha, "unseen", "harmful_rate"]
        if rate is not None and perplexity <= base_perplexity * (1 + budget):
            allowed[alpha] = (rate, perplexity, of[alpha, "unseen", "degenerate_rate"])
    if not allowed:
        return {"alpha": None, "why": f"at no scale does normal perplexity stay within {budget:.0%} of the base's"}
    alpha = min(allowed, key=lambda one: allowed[one][:2])
    rate, perplexity, degenerate = allowed[alpha]
    return {
        "alpha": alpha,
        "why": f"{decoding} harmful rate {rate:.1%} (degenerate {degenerate:.1%}), the lowest of "
        f"{len(allowed)} scales whose normal perplexity is within {budget:.0%} of the base's: "
        f"{perplexity:.4g} against {base_perplexity:.4g}",
    }
