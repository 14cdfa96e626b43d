"""Makers of bad input (tests/commands/refusals/): files and models with one thing wrong.

Each maker takes a namespace of folders: base, tuned and adapter, which are models, and here, to write into.
"""

import json
import shutil
from collections.abc import Callable
from types import SimpleNamespace

from safetensors.torch import load_file, save_file

Maker = Callable[[SimpleNamespace], object]


def file(name: str, content: str | bytes) -> Maker:
    """Make {here}/name."""
    return lambda at: (at.here / name).write_bytes(content.encode() if isinstance(content, str) else content)


def link(name: str, to: str) -> Maker:
    """Make the symbolic link {here}/name."""
    return lambda at: (at.here / name).symlink_to(to.format(**vars(at)))


def changed(of: str, **files: str | bytes | dict | None) -> Maker:
    """Make {here}/bad, a copy of a model with some files replaced ("__" is a dot), or removed by None."""

    def make(at: SimpleNamespace) -> None:
        folder = shutil.copytree(getattr(at, of), at.here / "bad")
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.unlink(missing_ok=True)
            if isinstance(content, dict):
                content = json.dumps(content)
            if content is not None:
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def with_config(**settings: object) -> Maker:
    """Make {here}/bad, the base with other settings in its config.json."""

    def make(at: SimpleNamespace) -> None:
        config = json.loads((at.base / "config.json").read_text())
        changed("base", config__json={**config, **settings})(at)

    return make


def with_header(header: str | dict, length: int | None = None, data: bytes = bytes(8)) -> Maker:
    """Make {here}/bad, the base with a model.safetensors of that header and data."""
    text = (json.dumps(header) if isinstance(header, dict) else header).encode()
    size = len(text) if length is None else length
    return changed("base", model__safetensors=size.to_bytes(8, "little") + text + data)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict:
    """The description of an entry in a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def without_a_layer(at: SimpleNamespace) -> None:
    """Make {here}/bad, the base without its second layer."""
    with_config(num_hidden_layers=1)(at)
    path = at.here / "bad" / "model.safetensors"
    save_file({name: e for name, e in load_file(path).items() if "layers.1." not in name}, path, {"format": "pt"})


def without_rank(at: SimpleNamespace) -> None:
    """Make {here}/bad, the adapter with matrices of rank 0."""
    changed("adapter")(at)
    path = at.here / "bad" / "adapter_model.safetensors"
    entries = {name: e[:0] if "_A." in name else e[:, :0].contiguous() for name, e in load_file(path).items()}
    save_file(entries, path)


def with_entries(of: str, change: Callable[[dict], object]) -> Maker:
    """Make {here}/bad, a model whose entries `change` has changed in place."""

    def make(at: SimpleNamespace) -> None:
        changed(of)(at)
        entries = load_file(at.here / "bad" / "model.safetensors")
        change(entries)
        save_file(entries, at.here / "bad" / "model.safetensors", {"format": "pt"})

    return make


def cut(of: str, keep: float) -> Maker:
    """Make {here}/bad, a model whose weights end too early."""

    def make(at: SimpleNamespace) -> None:
        content = (getattr(at, of) / "model.safetensors").read_bytes()
        changed(of, model__safetensors=content[: int(len(content) * keep)])(at)

    return make


def indexed(weight_map: object) -> Maker:
    """Make {here}/bad, the base with an index in place of its weights."""
    index = {"model__safetensors__index__json": {"weight_map": weight_map}}
    return lambda at: (
        changed("base", model__safetensors=None, **index)(at),
        shutil.copy(at.base / "model.safetensors", at.here / "other.safetensors"),
    )


def fill(name: str, value: float) -> Callable[[dict], object]:
    """Set the first element of an entry."""
    return lambda entries: entries[name].view(-1)[:1].fill_(value)
