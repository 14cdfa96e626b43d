"""A model to measure: what it is called, what identifies it, and how it is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from harmful_unlearn.cli.flag_parser import flag
from harmful_unlearn.data.templates import TEMPLATES, Template, TemplateChoice
from harmful_unlearn.errors import UserError
from harmful_unlearn.models import loading
from harmful_unlearn.storage.provenance import revision_of
from harmful_unlearn.storage.run_record import RunRecord, training_digest
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder

BASE = "base"  # the label of the model that all others are compared with
_asking = partial(flag, group="asking and judging")
LoadedModel = tuple[PreTrainedModel, Template]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to measure.

    Attributes:
        label: its name in every file and table.
        identity: what tells it from another model of that label (a fingerprint, an alpha).
        load: called only if something of it is still to be measured; in eval mode, on its device.
        folder: where it is, if it is in a folder.
        trained_from: the label of the model that an attacker fine-tuned, if it is what came of that.
    """

    label: str
    identity: dict
    load: Callable[[], LoadedModel]
    folder: Path | None = None
    trained_from: str | None = None

    @property
    def is_of_base(self) -> bool:
        """Whether it is the base, or made of it by an attack: then other evaluations can use its answers."""
        return BASE in (self.label, self.trained_from)


def evaluated_model(label: str, folder: Path, load: Callable[[Path], LoadedModel]) -> EvaluatedModel:
    """The model in `folder`, to measure. Raises UserError: it is an adapter, or not a complete model."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} is a LoRA adapter: write the complete model with "
            f"`python task_vector.py --base BASE --finetuned {folder} --output NEW --scaling_coef -1`, and give NEW"
        )
    RunRecord.read(folder)  # raises if it is broken
    weights = SafetensorsFolder(folder)
    # The fingerprint reads the start of each shard, which two unlearned models may share.
    identity: dict = {
        "revision": revision_of(folder),
        "fingerprint": weights.fingerprint(),
        "made_by_sha256": training_digest(folder),
    }
    if not identity["made_by_sha256"] and not identity["revision"]:
        identity["written_ns"] = [(folder / shard).stat().st_mtime_ns for shard in weights.shards]
    return EvaluatedModel(label, identity, partial(load, folder), folder)


def load_model(
    folder: Path, precision: str, device_map: str | None = None, template: TemplateChoice | None = None
) -> LoadedModel:
    """The model in `folder`, in eval mode on its device, and the template with its tokenizer. Raises UserError."""
    tokenizer = loading.load_tokenizer(folder, loading.load_config(folder))
    model = loading.load_model(folder, torch.bfloat16 if precision == "bf16" else torch.float32, device_map)
    if not device_map:
        model.to(PartialState().device)
    return model.eval(), (template or TemplateChoice()).of(tokenizer)


@dataclass(frozen=True, kw_only=True)
class TemplateSettings:
    """Flags of how models are asked."""

    template: str = _asking(
        "how a question becomes a prompt: the authors' released text, or the tokenizer's chat template; auto: as in "
        "the models' training, else the chat template if there is one",
        choices=TEMPLATES,
        default="auto",
    )
    system_prompt: str | None = _asking("of the chat, in place of its template's own", metavar="TEXT")

    def template_of(self, trainings: list[RunRecord], base_folder: Path) -> Template:
        """The template of models that these trainings made from the base.

        Raises:
            UserError: they were trained in several templates, or in another than the flags say.
        """
        known = {
            TemplateChoice(run.training.get("template", "released"), run.training.get("system_prompt"))
            for run in trainings
        }
        if len(known) > 1:
            names = " and ".join(sorted(f"{name} (system prompt: {prompt})" for name, prompt in known))
            raise UserError(f"these models were trained in different templates, {names}: measure them one by one")
        choice = known.pop() if known else TemplateChoice(self.template, self.system_prompt)
        if self.template not in ("auto", choice.name) or self.system_prompt not in (None, choice.system_prompt):
            raise UserError(
                f"the model was trained in the template {choice.name} (system prompt: {choice.system_prompt}): leave "
                "out --template and --system_prompt, which follow it"
            )
        template = choice.of(loading.load_tokenizer(base_folder, loading.load_config(base_folder)))
        if any(run.prompt_template not in (None, template.text) for run in trainings):
            raise UserError("the tokenizer's chat template has changed since the training: give the base of that time")
        return template
