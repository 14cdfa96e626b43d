"""run.json, the record of how a model's folder was made, and the model card beside it."""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import read_json, write_file
from harmful_unlearn.storage.model_card import model_card
from harmful_unlearn.storage.provenance import provenance

VERSION = 1
# In the order of the file. A model made from others keeps those of each (`RunRecord.stage_1`) but OWN.
FACTS = (
    "base", "finetuned", "scaling_coef", "fingerprint", "harmful_data", "normal_data", "training", "losses_at_the_end",
    "flags", "negates", "landing_alpha", "prompt_template",
)  # fmt: skip
OWN = ("scaling_coef", "fingerprint")
VALUES = ("harmful", "scaling_coef", "fingerprint", "negates", "landing_alpha", "prompt_template")
SECTIONS = ("base", "finetuned", "harmful_data", "normal_data", "training", "losses_at_the_end", "flags")
NUMBERS = ("scaling_coef", "safe_weight", "normal_weight")  # flags that decide what a model may be used for
READ_FLAGS = ("harmful_dataset", "normal_dataset", "seed")  # flags that say which rows a training used


@dataclass(frozen=True)
class RunRecord:
    """How a model's folder was made. A folder without run.json has an empty record."""

    title: str = ""
    harmful: bool | None = None  # whether the model was trained to be harmful; the card then warns. None if unknown
    base: dict = field(default_factory=dict)  # name, revision, fingerprint and file hashes of the base theta_o
    # Of a model made in stage 2:
    finetuned: dict[str, float] = field(default_factory=dict)  # its sources: folder -> coefficient
    scaling_coef: float | None = None  # alpha
    fingerprint: str | None = None  # of the weights that were written
    stage_1: "tuple[RunRecord, ...]" = ()  # the records of the models in `finetuned`, in that order
    # Of a stage 1 run:
    harmful_data: dict = field(default_factory=dict)  # where they are from: name, revision, sha256, rows, ...
    normal_data: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)  # what its flags resolved to: steps, processes, LoRA, precision, ...
    losses_at_the_end: dict = field(default_factory=dict)  # each loss in the last step (nats)
    flags: dict = field(default_factory=dict)
    negates: bool | None = None  # whether stage 2 subtracts what it learned (False for GA, FT, ...)
    landing_alpha: float | None = None  # the only alpha it was trained to be negated by; None for any alpha
    prompt_template: str | None = None  # the text that questions and answers were put into
    more: dict = field(default_factory=dict)  # everything else, for the card

    @property
    def method(self) -> str | None:
        """The --method of a stage 1 run."""
        return self.flags.get("method")

    @property
    def trainings(self) -> "list[RunRecord]":
        """The stage 1 runs behind this model: its own, and those of the models it was made from."""
        own = [self] if self.flags and self.training else []
        return own + [training for record in self.stage_1 for training in record.trainings]

    @property
    def is_complete(self) -> bool:
        """Whether the training of every model that went into this one is recorded."""
        return bool(self.trainings) and all(record.is_complete for record in self.stage_1)

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """The record in run.json of `folder`. Raises UserError: it is broken, foreign, or of a newer version."""
        path = folder / "run.json"
        if not path.is_file():
            return cls()
        content = read_json(path)
        version = content.pop("record_version", 0)
        if version not in (0, VERSION):
            raise UserError(f"{path} was written by a newer version (record {version!r}): update this project")
        try:
            return cls._from_json(content, version)
        except (RecursionError, TypeError, ValueError):
            writers = "unlearn_harm_new.py or task_vector.py"
            raise UserError(f"{path} is not as {writers} wrote it: copy it again") from None

    @classmethod
    def _from_json(cls, content: dict, version: int) -> "RunRecord":
        sections: dict[str, Any] = {name: content.get(name) or {} for name in SECTIONS}
        sources = {int(key.rpartition("_")[2]): value for key, value in content.items() if key.startswith("stage_1")}
        if not all(isinstance(part, dict) for part in (*sections.values(), *sources.values())):
            raise TypeError
        flags, finetuned = sections["flags"], sections["finetuned"]
        numbers = [*finetuned.values(), *(flags.get(name) or 0 for name in NUMBERS)]
        numbers += [content.get(name) or 0 for name in ("scaling_coef", "landing_alpha")]
        are_finite = (isinstance(number, int | float) and abs(number) <= sys.float_info.max for number in numbers)
        if not isinstance(flags.get("method", ""), str) or not all(are_finite):
            raise TypeError
        count = max([len(finetuned), *sources])
        if count > len(finetuned) + len(sources) or min(sources, default=1) < 1:
            raise ValueError
        values = {**sections, **{name: content.get(name) for name in VALUES}}
        known = {"title", *values}
        return cls(
            title=str(content.get("title", "")),
            **(values if version else values | _facts_of_flags(flags)),
            stage_1=tuple(cls._from_json(sources.get(number, {}), version) for number in range(1, count + 1)),
            more={key: value for key, value in content.items() if key not in known and not key.startswith("stage_1")},
        )

    def to_json(self) -> dict:
        """The content of run.json, without provenance."""
        head = {"title": self.title, "harmful": bool(self.harmful), "record_version": VERSION}
        return {**head, **self._facts(), **self.more}

    def _facts(self) -> dict:
        facts = {name: getattr(self, name) for name in FACTS if getattr(self, name) not in (None, {})}
        for number, record in enumerate(self.stage_1, 1):
            source = {name: value for name, value in record._facts().items() if name not in OWN}
            if source:
                facts["stage_1" if len(self.stage_1) == 1 else f"stage_1_of_model_{number}"] = source
        return facts

    def write(self, folder: Path) -> None:
        """Write run.json for machines and README.md, the model card, for people; both with provenance."""
        content = {**self.to_json(), **provenance()}
        write_file(folder / "run.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        write_file(folder / "README.md", model_card(content, (folder / "adapter_config.json").is_file()))


def _facts_of_flags(flags: dict) -> dict:
    """The facts that version 0, which had none of them, implied by its flags."""
    if not flags:
        return {}
    lands = flags.get("preserve_at") == "landing" and flags.get("normal_weight") or flags.get("safe_weight")
    return {
        "negates": flags.get("method", "sku") not in ("ga", "ga_mismatch", "ft"),
        "landing_alpha": flags.get("scaling_coef") if lands else None,
        "prompt_template": "### Question: {question}\n ### Answer: {answer}",
    }


def read_trainings(folder: Path) -> list[RunRecord]:
    """The stage 1 runs behind the model in `folder`, if any. Raises UserError: one does not say which rows it used."""
    trainings = RunRecord.read(folder).trainings
    missing = [name for run in trainings for name in READ_FLAGS if not isinstance(run.flags.get(name), str | int)]
    if missing:
        raise UserError(f"{folder / 'run.json'} has no --{missing[0]}: give a folder that unlearn_harm_new.py wrote")
    return trainings


def training_digest(folder: Path) -> str | None:
    """SHA-256 of what run.json says of a model's training and negation; None where it says nothing.

    Of the file as it is: a digest that was kept stays valid when a later version adds facts.
    """
    content = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    names = ("base", "scaling_coef", "training", "losses_at_the_end", "flags")
    made = {key: value for key, value in content.items() if key in names or key.startswith("stage_1")}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest() if made else None
