"""What a comparison measured: comparison.json, and all that its report shows."""

import json
from dataclasses import dataclass, field

BASE, SKU, ORACLE = "base", "sku", "oracle"  # names of models that the report treats in a way of their own


@dataclass
class Comparison:
    """The content of comparison.json.

    Rows of figures are dicts as `metrics.figures` gives them, each with its "seed". Shares are of 1; the value None
    means that there was nothing to measure. An empty part is omitted from the report.

    Attributes:
        model: the base model.
        command: what made the comparison.
        settings: what was asked for, by name.
        flags: all flags of the command, for --replay.
        inputs: by seed, what tells the base and the training data from others, for --replay.
        methods: the compared models by name, in the order of the tables; the base's name is "base". Of each, its
            "label", its "group" of tables ("main" or "ablation"), the "command" that trained it with the first seed
            (None for the base), and a "note" if seeds of it are missing.
        judge: its "name", and what is known of it, "by_seed".
        figures: of the test prompts, each with its "model".
        attacks: harmful rates under attack, each with its "model", "attack" and "variant", as `attack_figures`.
        sweep: figures of the validation prompts, each with its "method", "alpha", and the only alpha that the method
            was "trained_for" (None if it was for any).
        recommended: "seed", "method", "alpha" (None for none), "budget" and "why".
        categories: harmful rates on the prompts of one "category", each with the task "vector" subtracted.
        oracle: distances of each "model" from the one that never learned any harm.
        relearning: harmful rates under fine-tuning, each with its "model", "attacker" and "steps", as
            `RelearnPlan.measure`.
        trials: of a search, each point of each trial: its "method", number ("trial"), varied "flags", "alpha", the
            normal "perplexity" as a multiple of the base's, "refusals", and, where it kept the bounds, "harm"; as
            `Search.table`.
        answers: "set", "prompt", "reference", and the "answers" by model: "answer" and "verdict"; of the first seed.
        losses: the metrics of each step by model; of the first seed.
        provenance: what ran.
    """

    model: str
    seeds: list[int]
    command: str
    settings: dict
    methods: dict[str, dict]
    judge: dict
    flags: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    figures: list[dict] = field(default_factory=list)
    attacks: list[dict] = field(default_factory=list)
    sweep: list[dict] = field(default_factory=list)
    recommended: list[dict] = field(default_factory=list)
    categories: list[dict] = field(default_factory=list)
    oracle: list[dict] = field(default_factory=list)
    relearning: list[dict] = field(default_factory=list)
    trials: list[dict] = field(default_factory=list)
    answers: list[dict] = field(default_factory=list)
    losses: dict[str, list[dict]] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=1, ensure_ascii=False) + "\n"


def short_name(source: str) -> str:
    """What a report calls a model or a file: a hub id as it is; of a path the last part.

    Of a path with "{seed}", the part before the seed's, too: logs/demo/seed-{seed}/base is "demo (base of each seed)".
    """
    parts = source.split("/")
    seeded = next((place for place, part in enumerate(parts) if "{seed}" in part), None)
    if seeded is None:
        return source if len(parts) < 3 else parts[-1]
    each = f"{parts[-1]} of each seed"
    return f"{parts[seeded - 1]} ({each})" if seeded else each
