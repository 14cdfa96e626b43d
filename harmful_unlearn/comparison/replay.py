"""reproduce.py --replay: do again what a comparison.json says that it is, and compare the figures."""

import hashlib
import re
from pathlib import Path
from typing import Any

from harmful_unlearn.comparison.recorded_flags import comparison_file, replayed_flags
from harmful_unlearn.comparison.settings import ComparisonSettings
from harmful_unlearn.comparison.trainings import as_words
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import UserError
from harmful_unlearn.models import hub
from harmful_unlearn.storage.files import read_json, resolved
from harmful_unlearn.storage.provenance import check_folder, differences
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder
from harmful_unlearn.training.flags import parse_flags as training_flags

FILES = ("unseen_dataset", "utility_dataset", "recipe", "jailbreaks", "prompts", "judge", "refusal_judge")
MOVABLE = {
    "output", "replay", "device_map", "tokens_per_batch", "search_only", "model_name", "harmful_dataset",
    "normal_dataset", "more_normal_dataset", "unseen_dataset", "utility_dataset", "bleurt", "oracle",
}  # fmt: skip
MEASURED = ("value", "low", "high", "n")  # of a figure; the rest says what it is of


def inputs(settings: ComparisonSettings, seed: int) -> dict:
    """What tells the base, the data and all files of a seed from others.

    Args:
        settings: of the seed.

    Raises:
        UserError: the data cannot be read, or there is no such base.
    """
    base = hub.resolve_model(settings.model_name, weights=False)
    flags = training_flags([*as_words(settings.training_data), *settings.train_flags])
    harmful = read_harmful(flags.harmful_dataset, flags.harmful_revision, flags.harmful_split)
    normal = read_normal(flags.normal_dataset, seed, flags.more_normal_dataset)
    data = {"harmful": harmful.source, "normal": normal.source, "more normal": normal.source.get("more", {})}
    known = {name: {key: source.get(key) for key in ("sha256", "revision")} for name, source in data.items()}
    for name in FILES:
        value = getattr(settings, name)
        for text in map(str, value if isinstance(value, list) else [value]):
            file = Path(re.split("[=:]", text)[-1])  # NAME=FILE of --prompts, KIND:FILE of a judge
            if file.is_file():
                known[f"{name} {text}"] = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return {**base_hashes(base), **known}


def base_hashes(base: Path) -> dict[str, str]:
    """Of the base's weights and files; without the weights of a hub model that are still to be downloaded."""
    weights = {"weights": SafetensorsFolder(base).fingerprint()} if any(base.glob("*.safetensors")) else {}
    return {f"base's {name}": value for name, value in {**weights, **hub.file_hashes(base)}.items()}


def check_source(settings: ComparisonSettings) -> None:
    """Whether this is the comparison to replay, as far as flags can say. Data may have moved.

    Raises:
        UserError: a flag is another, or names a file as it was named from another folder.
    """
    assert settings.replay
    file = comparison_file(settings.replay)
    if resolved(settings.output) == resolved(file.parent):
        raise UserError("--output is the comparison that is replayed: give another folder")
    check_folder(read_json(file).get("provenance", {}), settings.to_json(), settings.replay)
    recorded, now = replayed_flags(settings.replay), settings.to_json()
    changed = [f"--{name}" for name in recorded if name not in MOVABLE and recorded[name] != now.get(name)]
    if changed:
        raise UserError(
            f"{', '.join(changed)} is not as {settings.replay} had it: leave it out, or run without --replay"
        )


def check_inputs(source: Path, seed: int, now: dict) -> None:
    """Raises UserError: base, data or files of a seed are not those of the recorded comparison."""
    recorded = read_json(comparison_file(source)).get("inputs", {}).get(str(seed), {})
    both = {name: (recorded[name], now[name]) for name in recorded.keys() & now.keys()}
    changed = sorted(name for name, values in both.items() if values[0] != values[1])
    if changed:
        raise UserError(
            f"this is not what made {source}: with seed {seed} {', '.join(changed)} differ from what is recorded "
            f"({recorded[changed[0]]}); give what it had"
        )


def compare(source: Path, figures: list[dict]) -> None:
    """Print how a comparison's figures differ from the recorded ones, and what has changed otherwise.

    Raises:
        UserError: figures differ, though versions and hardware are the same.
    """
    content = read_json(comparison_file(source))
    changes = differences(content.get("provenance", {}))
    lines = ["replayed:", *(changes or ["versions and hardware are those of the recorded comparison"])]
    recorded = {_key(figure): figure for figure in content["figures"]}
    both = [(recorded[_key(figure)], figure) for figure in figures if _key(figure) in recorded]
    lines.append(f"{len(both)} of {len(recorded)} recorded figures are there again")
    others = [(before, now) for before, now in both if before["value"] != now["value"]]
    outside = [(before, now) for before, now in others if not _within(before, now["value"])]
    lines.append(f"{len(both) - len(others)} are equal, and {len(outside)} are outside of the recorded 95 % interval")
    for before, now in outside[:10]:
        lines.append(f"{', '.join(_key(now))}: {now['value']} (recorded: {before['value']})")
    print("\n".join(lines))
    if others and not changes:
        raise UserError(f"the figures are not those of {source}, on the same versions and hardware")


def _key(figure: dict[str, Any]) -> tuple[str, ...]:
    """What a figure is of."""
    return tuple(str(figure[name]) for name in sorted(figure) if name not in MEASURED)


def _within(before: dict, value: float | None) -> bool:
    if None in (before["low"], before["high"], value):
        return False
    return bool(before["low"] <= value <= before["high"])
