"""Random pairs of models: streamed negation equals the task vectors in memory."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as serialized

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage import safetensors_io
from task_vector import TaskVector
from tests.helpers.inputs.fuzzing import SHAPES, bits, read_by_library, tensors
from tests.helpers.models.tiny_pairs import CONFIGS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that the examples of a test write to, one after the other."""
    return tmp_path_factory.mktemp("fuzz")


FLOATS = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
INTEGERS = st.sampled_from([torch.int64, torch.int8, torch.uint8, torch.bool])
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FREE = ["a", "b.weight", "n.0.bias", "räksmörgås"]


@st.composite
def checkpoint_pairs(draw) -> tuple[dict, list[dict], bool]:
    """A base, one or two fine-tuned ones of other float dtypes, and whether the base ties embeddings and head.

    Where it does, each of them holds one of the two names, or both.
    """
    tied = draw(st.booleans())
    names = draw(st.lists(st.sampled_from([EMBED, NORM] if tied else FREE), min_size=1, unique=True))
    states = [{} for _ in range(draw(st.integers(2, 3)))]
    for name in names:
        shape, is_float = draw(SHAPES), tied or draw(st.booleans())
        for state in states:
            tensor = draw(tensors(FLOATS if is_float else INTEGERS, st.just(shape)))
            if is_float and draw(st.integers(0, 9)):  # mostly finite
                tensor = torch.nan_to_num(tensor.float(), 1.0, 2.0, 3.0).clamp(-9, 9).to(tensor.dtype)
            kept = [name]
            if tied and name == EMBED:
                kept = draw(st.sampled_from([[EMBED], [HEAD], [EMBED, HEAD]]))
            state |= dict.fromkeys(kept, tensor)
    return states[0], states[1:], tied


@st.composite
def layouts(draw, state: dict) -> dict[str, dict]:
    """A state in one file, or in shards, in any order."""
    if draw(st.booleans()):
        return {"model.safetensors": state}
    shards = {}
    for name in draw(st.permutations(list(state))):
        shards.setdefault(f"model-{draw(st.integers(1, 3))}.safetensors", {})[name] = state[name]
    return shards


def write_checkpoint(folder: Path, shards: dict[str, dict], tied: bool) -> Path:
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for file, entries in shards.items():
        (folder / file).write_bytes(serialized({name: entry.clone() for name, entry in entries.items()}))
    if "model.safetensors" not in shards:
        weight_map = {name: file for file, entries in shards.items() for name in entries}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {**CONFIGS["qwen2"].to_dict(), "tie_word_embeddings": True} if tied else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


COEFS = st.sampled_from([1.0, 0.0, -1.0, 0.5, 1e-3, 0.1, -2.5, 1e30])


@given(st.data())
def test_streamed_negation_is_the_task_vectors_in_memory(place, data):
    """To the bit, whatever dtypes, shapes, shards, ties, scales and length of a stretch."""
    base, others, tied = data.draw(checkpoint_pairs())
    alphas = data.draw(st.lists(COEFS, min_size=1, max_size=3, unique=True))
    coefs = data.draw(st.lists(COEFS, min_size=len(others), max_size=len(others)))
    folders = [
        write_checkpoint(place / f"state-{number}", data.draw(layouts(state)), tied)
        for number, state in enumerate([base, *others])
    ]
    twin = {HEAD: EMBED}
    named = [{twin.get(name, name): entry for name, entry in state.items()} for state in (base, *others)]
    vectors = [TaskVector(named[0], other) for other in named[1:]]
    total = sum(coef * vector for coef, vector in zip(coefs, vectors, strict=True))
    entries = {name: f"entry_{number}" for number, name in enumerate(named[0])}
    tau = TaskVector(vector={entries[name]: entry for name, entry in total.vector.items()})
    model = torch.nn.Module()
    for name, entry in entries.items():
        model.register_buffer(entry, named[0][name])
    expected = {alpha: (-tau).apply_to(model, alpha).state_dict() for alpha in alphas}
    out, vector = place / "negated", place / "vector"
    wanted = data.draw(st.booleans())
    results = [*expected.values(), tau.vector] if wanted else expected.values()
    finite = all(entry.isfinite().all() for state in results for entry in state.values() if entry.is_floating_point())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "CHUNK_ELEMENTS", data.draw(st.integers(1, 9)))
        terms = list(zip(folders[1:], coefs, strict=True))
        try:
            negate(folders[0], terms, out, *alphas, save_vector=vector if wanted else None, overwrite=True)
        except UserError as error:
            assert not finite or not tau.vector, error
            return
    assert finite and tau.vector
    for alpha in alphas:
        folder = out if len(alphas) == 1 else out / f"alpha-{alpha!r}".removesuffix(".0")
        found = {name: entry for file in folder.glob("*.safetensors") for name, entry in read_by_library(file).items()}
        assert found == {name: bits(expected[alpha][entries[twin.get(name, name)]]) for name in base}
    if wanted:
        loaded = TaskVector.load(vector).vector
        assert {twin.get(name, name): bits(entry) for name, entry in loaded.items()} == {
            name: bits(entry) for name, entry in total.vector.items()
        }
