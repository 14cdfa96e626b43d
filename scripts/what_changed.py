"""Where unlearning changed a model: in which weights, and at which tokens of harmless answers.

    .venv/bin/python scripts/what_changed.py --base BASE --model NAME=FOLDER --tasks TASKS.jsonl

prints two tables in Markdown. The first has the length of each part's change, as a percentage of the part's own length
(each the root of a sum of squares). The second has, by where a token stands in its answer, KL(base || model) of the
next token, and by how much the token became less likely, both in nats a token.
"""

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from transformers import PreTrainedModel

from harmful_unlearn.cli.flag_parser import FlagParser, flag
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.instructions import read_instructions
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.evals.evaluated_model import load_model
from harmful_unlearn.losses.objective import scored_logits
from harmful_unlearn.negation.arithmetic import Negation
from harmful_unlearn.reporting.blocks import table

LAYER = re.compile(r"\.(\d+)\.")
THIRDS = ("first third of the layers", "middle third of the layers", "last third of the layers")
ALL = "all weights"
PLACES = ("first", "2 to 10", "later", "end")  # of a token in its answer; the end counts among the later ones, too


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    base: Path = flag("the base's folder", type=Path, required=True)
    model: list[str] = flag(
        "an unlearned model (may be repeated)", action="append", metavar="NAME=FOLDER", required=True
    )
    tasks: str | None = flag("everyday tasks in Alpaca's columns that no model was trained on")
    normal_dataset: str | None = flag("normal data, of which the test part is read")
    seed: int = flag("of the training, by which the normal data were split", type=int, default=8888)
    n: int = flag("texts of each kind", type=int, default=60)
    max_length: int = flag("tokens of a text; longer ones are cut", type=int, default=512)


def relative_changes(base: Path, model: Path) -> dict[str, float]:
    """The length of each part's change as a share of its own: each kind of weight, each third of the layers, and all.

    Raises:
        UserError: the model does not fit the base.
    """
    negation = Negation(base, [(model, 1.0)])
    layers = 1 + max((int(found[1]) for name in negation.changed if (found := LAYER.search(name))), default=0)
    changed: dict[str, float] = defaultdict(float)
    own: dict[str, float] = defaultdict(float)
    for name in sorted(negation.changed):
        entire = slice(0, math.prod(negation.base.specs[name].shape))
        # The vector, and the base itself: tau times 0 is subtracted.
        squares = [float(values.double().square().sum()) for values in negation.values(name, entire, [None, 0.0])]
        for part in parts_of(name, layers):
            changed[part] += squares[0]
            own[part] += squares[1]
    last = [*THIRDS, ALL]
    order = sorted(own, key=lambda part: (part in last and 1 + last.index(part), part))
    return {part: math.sqrt(changed[part] / own[part]) if own[part] else 0.0 for part in order}


def parts_of(name: str, layers: int) -> list[str]:
    """The parts of the model that an entry belongs to, of `layers` layers."""
    kind = name.removesuffix(".weight")
    if found := LAYER.search(name):
        return [kind[found.end() :], THIRDS[3 * int(found[1]) // layers], ALL]
    return [kind.rpartition(".")[2], ALL]


@torch.inference_mode()
def token_changes(
    base: PreTrainedModel, model: PreTrainedModel, collator: Collator, pairs: list[Pair]
) -> Iterator[tuple[str, float, float]]:
    """Of each token of the answers its place (PLACES), KL(base || model) of the prediction of it, and by how much it
    became less likely, both in nats."""
    for pair in pairs:
        rows = collator.separate_answers([pair])
        if not rows[0].entries:
            continue
        batch = collator.batch(rows)
        before, after = (scored_logits(one, batch).log_softmax(-1)[batch.index] for one in (base, model))
        divergence = (before.exp() * (before - after)).sum(-1).tolist()
        less = (before - after).gather(-1, batch.target[:, None])[:, 0].tolist()
        for number, change in enumerate(zip(divergence, less, strict=True)):
            yield ("first" if number == 0 else "2 to 10" if number < 10 else "later"), *change
        if not collator.encode([pair])[0].cut:
            yield "end", divergence[-1], less[-1]


def main(arguments: list[str] | None = None) -> None:
    """Print both tables."""
    description, _, more = __doc__.partition("\n")
    parser = FlagParser(prog="what_changed.py", description=description, epilog=more)
    parser.add_settings(Settings)
    settings = Settings(**vars(parser.parse_args(arguments)))
    named = [text.partition("=") for text in settings.model]
    folders = {name: Path(folder) for name, _, folder in named if name and folder}
    if len(folders) < len(named):
        parser.error("--model: give each as NAME=FOLDER, with a name of its own")
    texts = {}
    if settings.tasks:
        texts["everyday tasks"] = read_instructions(settings.tasks, "give --tasks a file in Alpaca's columns").pairs
    if settings.normal_dataset:
        normal = read_normal(settings.normal_dataset, settings.seed)
        texts["normal answers"] = [normal.texts[row] for row in normal.test]

    shares = pd.DataFrame({name: relative_changes(settings.base, folder) for name, folder in folders.items()})
    rows = [[part, *(f"{100 * share:.2g}" for share in own)] for part, *own in shares.itertuples()]
    print(table(None, ["change of, %", *folders], rows).markdown, flush=True)
    if not texts:
        return
    base, template = load_model(settings.base, "fp32")
    collator = Collator(template, "paper", settings.max_length)
    columns: dict[str, dict[str, str]] = defaultdict(dict)
    for name, folder in folders.items():
        model, _ = load_model(folder, "fp32")
        for kind, pairs in texts.items():
            changes = token_changes(base, model, collator, pairs[: settings.n])
            places = pd.DataFrame(changes, columns=["place", "KL", "less"]).groupby("place")
            for place, of_place in sorted(places, key=lambda group: PLACES.index(group[0])):
                row = f"{kind}, {place} (n = {len(of_place)})"
                columns[f"{name}: KL"][row] = f"{of_place['KL'].mean():.2f}"
                columns[f"{name}: less likely by"][row] = f"{of_place['less'].mean():.2f}"
    rows = [[*row] for row in pd.DataFrame(columns).itertuples()]
    print(table(None, ["tokens, nats", *columns], rows).markdown, end="")


if __name__ == "__main__":
    sys.exit(exit_code(main))
