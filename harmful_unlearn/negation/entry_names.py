"""Which entries of two models are the same: two folders may name the same weight differently."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from harmful_unlearn.errors import UserError

Synonyms = Callable[[str], list[str]]  # an entry's name -> every name that it may have, its own first
IsConstant = Callable[[str], bool]  # an entry's name -> whether it is a constant that old releases saved, not a weight
MAX_LISTED = 5  # entries that an error names


def plain_names() -> tuple[Synonyms, IsConstant]:
    """For models that name all entries alike: no synonyms, no constants."""
    return lambda name: [name], lambda name: False


def class_names(folder: Path) -> tuple[Synonyms, IsConstant]:
    """What the model class of `folder` knows about the names of its entries.

    The synonyms of an entry are the names of the weights tied to it (config.tie_word_embeddings), each with and
    without the prefix that a causal LM adds to its inner model ("model.decoder.x", "decoder.x").
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception:  # an unknown architecture, or a broken config.json; the type depends on the library's release
        return plain_names()
    prefix = f"{model.base_model_prefix}."
    ties: dict[str, set[str]] = {}
    for names in model.all_tied_weights_keys.items():
        target, origin = (name.removeprefix(prefix) for name in names)
        ties[target] = ties.setdefault(origin, {origin})
        ties[target].add(target)
    known = {name.removeprefix(prefix) for name in model.state_dict()}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]

    def synonyms(name: str) -> list[str]:
        bare = name.removeprefix(prefix)
        group = [bare, *sorted(ties.get(bare, {bare}) - {bare})]
        return [name, *(form for twin in group for form in (twin, prefix + twin))]

    def is_constant(name: str) -> bool:
        # The class's patterns match some weights, too: what the class has an entry for is not a constant.
        return name.removeprefix(prefix) not in known and any(re.search(pattern, name) for pattern in ignored)

    return synonyms, is_constant


def match(
    base: Mapping[str, Iterable[int]],
    changed: Mapping[str, Iterable[int]],
    synonyms: Synonyms,
    label: str,
    partial: bool = False,
) -> dict[str, str]:
    """For each entry of the base, its name in what was made from the base.

    Args:
        base, changed: shapes by name.
        label: names `changed` in an error.
        partial: `changed` may lack entries, and so does the result.

    Raises:
        UserError: an entry is missing (unless `partial`), extra, or of another shape.
    """
    matched: dict[str, str] = {}
    missing, reshaped = [], []
    extra = set(changed)
    for name, shape in base.items():
        names = synonyms(name)
        extra.difference_update(names)
        twin = next((entry for entry in names if entry in changed), None)
        if twin is None:
            missing.append(name)
            continue
        matched[name] = twin
        if tuple(changed[twin]) != tuple(shape):
            reshaped.append(f"{name} ({tuple(changed[twin])}, not {tuple(shape)})")
    refuse_mismatch(label, [] if partial else missing, [name for name in changed if name in extra], reshaped)
    return matched


def refuse_untied(name: str, twins: Iterable[str], equal: Callable[[str, str], bool]) -> None:
    """Where the base ties entries, the fine-tuned model must have one tensor, or equal ones. Raises UserError."""
    for twin in dict.fromkeys(twins):
        if twin != name and not equal(twin, name):
            raise UserError(f"{twin} and {name} are tied in the base and differ in the fine-tuned model: tie them")


def refuse_mismatch(label: str, missing: list[str], extra: list[str], reshaped: list[str]) -> None:
    """Raises UserError, naming the entries, if there are any."""
    problems = []
    for kind, names in (("missing", missing), ("extra", extra), ("of another shape", reshaped)):
        if names:
            listed = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
            problems.append(f"{len(names)} {kind}: {listed}")
    if problems:
        raise UserError(f"{label} does not fit the base ({'; '.join(problems)}): give one made from this very base")
