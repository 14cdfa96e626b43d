"""Which entries of two checkpoints are the same, whatever each calls them."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from harmful_unlearn.errors import UserError


def class_names(folder: Path) -> tuple[Callable[[str], list[str]], Callable[[str], bool]]:
    """What the model's class says of names: an entry's synonyms, and whether it is not a weight at all.

    Synonyms are tied weights' names (config.tie_word_embeddings), with and without the prefix that
    tells a causal LM from its bare model ("model.decoder.x", "decoder.x").
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception:  # of an architecture that transformers lacks, or of a spoilt config.json, as the release has it
        return lambda name: [name], lambda name: False
    prefix = f"{model.base_model_prefix}."
    ties: dict[str, set[str]] = {}
    for target, origin in model.all_tied_weights_keys.items():
        group = ties.setdefault(origin.removeprefix(prefix), {origin.removeprefix(prefix)})
        group.add(target.removeprefix(prefix))
        ties[target.removeprefix(prefix)] = group
    known = {name.removeprefix(prefix) for name in model.state_dict()}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]

    def synonyms(name: str) -> list[str]:
        bare = name.removeprefix(prefix)
        group = [bare, *sorted(ties.get(bare, {bare}) - {bare})]
        return [name, *(form for twin in group for form in (twin, prefix + twin))]

    def is_constant(name: str) -> bool:
        # Old checkpoints hold constants that the class has no entry for; its patterns match weights too.
        return name.removeprefix(prefix) not in known and any(re.search(one, name) for one in ignored)

    return synonyms, is_constant


LISTED = 20  # entries that an error names


def match(
    base: Mapping[str, Iterable[int]],
    other: Mapping[str, Iterable[int]],
    synonyms: Callable[[str], list[str]],
    what: str,
    partial: bool = False,
) -> dict[str, str]:
    """For each entry of the base, its name on the other side; absent ones are left out if `partial`.

    Args:
        base, other: shapes by name.
        synonyms: every name that an entry of the base may have, its own first.
    """
    known = {name: synonyms(name) for name in base}
    found = {name: next((twin for twin in known[name] if twin in other), None) for name in base}
    missing = [] if partial else [name for name, twin in found.items() if twin is None]
    found = {name: twin for name, twin in found.items() if twin is not None}
    spoken_for = {twin for twins in known.values() for twin in twins}
    differ = [
        f"{name} ({tuple(other[twin])}, not {tuple(base[name])})"
        for name, twin in found.items()
        if tuple(base[name]) != tuple(other[twin])
    ]
    refuse_mismatch(what, missing, [name for name in other if name not in spoken_for], differ)
    return found


def refuse_untied(name: str, twins: list[str], equal: Callable[[str, str], bool]) -> None:
    """Where the base ties two entries, the other side must have one tensor, or two equal ones."""
    for twin in dict.fromkeys(twins):
        if twin != name and not equal(twin, name):
            raise UserError(f"{twin} and {name} are tied in the base and differ in the fine-tuned model: tie them")


def refuse_mismatch(what: str, missing: list[str], extra: list[str], differ: list[str]) -> None:
    problems = []
    for kind, names in (("missing", missing), ("extra", extra), ("of another shape", differ)):
        if names:
            shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
            problems.append(f"{len(names)} {kind}: {shown}")
    if problems:
        raise UserError(f"{what} does not fit the base ({'; '.join(problems)}): give one made from this very base")
