"""Where a task vector may come from on disk, and whether its entries fit the base's."""

from pathlib import Path

from torch import Tensor

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.entry_names import class_names, match, plain_names, refuse_untied
from harmful_unlearn.negation.lora_adapter import LoraAdapter
from harmful_unlearn.storage.files import read_json
from harmful_unlearn.storage.safetensors_io import VECTOR_STEM, SafetensorsFolder

WeightedFolders = list[tuple[Path, float]]  # (a source's folder, its coefficient) pairs


class FullModel(SafetensorsFolder):
    """A fine-tuned model: tau = finetuned - base."""

    partial = False

    def delta(self, name: str, span: slice, base: Tensor, out: Tensor) -> Tensor:
        """Elements `span` of tau's flattened entry, in the dtype of `out` and `base`."""
        return self.read_into(out, name, span.start).sub_(base)


class SavedVector(SafetensorsFolder):
    """A saved task vector: tau as it is."""

    def __init__(self, folder: Path):
        super().__init__(folder, VECTOR_STEM)
        self.partial = self.metadata.get("partial") == "true"

    def delta(self, name: str, span: slice, base: Tensor, out: Tensor) -> Tensor:
        """Elements `span` of tau's flattened entry, in the dtype of `out`."""
        return self.read_into(out, name, span.start)


Source = FullModel | SavedVector | LoraAdapter


def vector_metadata(partial: bool) -> dict[str, str]:
    """Metadata in the header of a saved vector's files."""
    return {"format": "pt", "partial": str(partial).lower()}


def is_saved_vector(folder: Path) -> bool:
    """Whether a folder holds a saved task vector."""
    return any((folder / f"{VECTOR_STEM}.safetensors{end}").is_file() for end in ("", ".index.json"))


def open_source(folder: Path) -> Source:
    """Open a folder as the kind of source that its files show. Raises UserError: it is none, or broken."""
    if (folder / "adapter_config.json").is_file():
        return LoraAdapter(folder)
    return SavedVector(folder) if is_saved_vector(folder) else FullModel(folder)


def open_matched(base: Path, folders: list[Path]) -> tuple[SafetensorsFolder, list[Source], list[dict[str, str]]]:
    """The base, a source for each folder, and for each source the base's entry names -> its own.

    Only headers are read, and tied entries.

    Raises:
        UserError: something is missing, broken, quantized, or does not fit the base.
    """
    base_model = SafetensorsFolder(base)
    if "quantization_config" in read_json(base / "config.json"):
        raise UserError(f"{base} is quantized: give the full-precision model")
    sources = [open_source(folder) for folder in folders]
    shapes = [
        {name: spec.shape for name, spec in model.specs.items() if spec.dtype.is_floating_point}
        for model in (base_model, *sources)
    ]
    differ = any(entries.keys() != shapes[0].keys() for entries in shapes)
    synonyms, is_constant = class_names(base) if differ else plain_names()  # the class takes seconds to load
    base_weights, *weights_of = ({n: shape for n, shape in entries.items() if not is_constant(n)} for entries in shapes)
    matches = []
    for source, weights in zip(sources, weights_of, strict=True):
        names = match(base_weights, weights, synonyms, str(source.folder), source.partial)
        if isinstance(source, FullModel):
            for name, twin in names.items():
                refuse_untied(twin, [entry for entry in synonyms(name) if entry in weights], source.equal)
        matches.append(names)
    return base_model, sources, matches
