"""Where a task vector may come from on disk, and whether its entries fit the base's."""

from pathlib import Path

from torch import Tensor

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.entry_names import class_names, match, refuse_untied
from harmful_unlearn.negation.lora_adapter import Adapter
from harmful_unlearn.storage.files import read_json
from harmful_unlearn.storage.safetensors_io import VECTOR_STEM, SafetensorsFolder


class FullModel(SafetensorsFolder):
    """A fine-tuned model: tau = finetuned - base."""

    partial = False

    def delta(self, name: str, span: slice, base: Tensor, out: Tensor) -> Tensor:
        """tau's elements `span` of the flattened entry, in the dtype of `out` and `base`."""
        return self.convert_into(out, name, span.start).sub_(base)


class SavedVector(SafetensorsFolder):
    """A saved task vector: tau as it is."""

    def __init__(self, folder: Path):
        super().__init__(folder, VECTOR_STEM)
        self.partial = self.metadata.get("partial") == "true"

    def delta(self, name: str, span: slice, base: Tensor, out: Tensor) -> Tensor:
        """tau's elements `span` of the flattened entry, in the dtype of `out`."""
        return self.convert_into(out, name, span.start)


Source = FullModel | SavedVector | Adapter


def vector_metadata(partial: bool) -> dict[str, str]:
    """What the header of a saved vector's files says."""
    return {"format": "pt", "partial": str(partial).lower()}


def open_source(folder: Path) -> Source:
    """A folder as what its files say it is. Raises UserError: it is none of the three, or broken."""
    if (folder / "adapter_config.json").is_file():
        return Adapter(folder)
    if any((folder / f"{VECTOR_STEM}.safetensors{end}").is_file() for end in ("", ".index.json")):
        return SavedVector(folder)
    return FullModel(folder)


def open_matched(base: Path, folders: list[Path]) -> tuple[SafetensorsFolder, list[Source], list[dict[str, str]]]:
    """Open the base and what was made from it, and match their entries by the headers alone.

    Returns:
        The base, a source for each folder, and for each the base's entry names -> its own.

    Raises:
        UserError: something is missing, broken, quantized, or does not fit the base.
    """
    source = SafetensorsFolder(base)
    if "quantization_config" in read_json(base / "config.json"):
        raise UserError(f"{base} is quantized: give the full-precision model")
    sources = [open_source(folder) for folder in folders]
    return source, sources, _match_sources(source, sources)


def _match_sources(base: SafetensorsFolder, sources: list[Source]) -> list[dict[str, str]]:
    """For each source, the base's entry names -> its own; the class is asked only if they differ."""
    weights = {name: spec.shape for name, spec in base.specs.items() if spec.is_float}
    others = [{name: spec.shape for name, spec in one.specs.items() if spec.is_float} for one in sources]
    synonyms = lambda name: [name]  # noqa: E731
    if any(other.keys() != weights.keys() for other in others):
        synonyms, is_constant = class_names(base.folder)
        weights, *others = (
            {name: shape for name, shape in shapes.items() if not is_constant(name)} for shapes in (weights, *others)
        )
    matched = []
    for one, other in zip(sources, others, strict=True):
        found = match(weights, other, synonyms, str(one.folder), one.partial)
        if isinstance(one, FullModel):
            for name, twin in found.items():
                refuse_untied(twin, [entry for entry in synonyms(name) if entry in other], one.equal)
        matched.append(found)
    return matched
