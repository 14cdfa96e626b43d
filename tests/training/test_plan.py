"""--check: the plan, and what is seen without loading weights."""

import math
import shutil

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses.fused_linear import chunk_rows
from harmful_unlearn.models import loading
from harmful_unlearn.models.blocks import steered_layer
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.models.tree_attention import TREE
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.training.plan import _activations, saved_bytes
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.running.runs import flags, prepared

SCRIPT = ROOT / "harmful_unlearn" / "unlearn_harm_new.py"
METRICS = {
    "step", "gd_loss", "rd_loss", "pd_loss", "total_loss", "lr", "grad_norm", "tokens", "seconds",
}  # fmt: skip


def test_check_prints_the_plan_and_writes_nothing(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))
    main(flags(tiny_model("opt"), tmp_path, "--check"))
    plan = capsys.readouterr().out
    for word in ("12 rows", "14 pairs", "16 texts", "steps", "tokens", "memory", "disk"):
        assert word in plan
    assert list(tmp_path.iterdir()) == []


def test_plan_counts_what_is_there(tiny_model, tmp_path, capsys):
    base = tiny_model("opt")
    short = ["--max_unlearn_steps", "2", "--max_length", "60"]
    run = prepared(base, tmp_path, *short)
    plan = run.plan
    seen = [run.batches.harmful.pairs[row] for row in range(4)]
    texts = seen + [run.batches.normal.texts[row] for row in run.batches.normal.train]
    long = sum(len(ids) > 60 for ids in run.template.texts(texts))
    rd = [pair for step in (0, 1) for pair in run.batches.random_pairs(step)]
    rd_long = sum(len(ids) > 60 for ids in run.template.texts(rd))
    assert (plan.pairs_seen, plan.cut, plan.cut_in_rd) == (4, long, rd_long) and long and rd_long
    parts = [part for step in (0, 1) for part in run.batches(step, torch.device("cpu"))]
    exact = sum(batch.tokens for part in parts for batch in part if batch)
    assert plan.tokens == exact
    assert all(size > 0 for size in plan.memory.values())
    smaller = prepared(base, tmp_path, *short, "--normal_weight", "0").plan
    assert smaller.memory["activations"] < plan.memory["activations"]
    with pytest.raises(UserError, match="--max_length leaves no harmful answer"):
        prepared(base, tmp_path, "--max_length", "8")


def test_check_compares_the_headers_of_stage_2(tiny_model, tmp_path):
    for more in (["--check"], []):
        with pytest.raises(UserError, match="does not fit the base"):
            main(flags(tiny_model("opt"), tmp_path, "--saved_model", str(tiny_model("llama")), *more))


def test_check_sees_broken_weights_without_loading_them(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("opt"), tmp_path / "base")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is broken"):
        main(flags(folder, tmp_path / "out", "--check"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no .safetensors weights"):
        main(flags(folder, tmp_path / "out", "--check"))


@pytest.mark.parametrize("architecture", ["opt", "llama"])
@pytest.mark.parametrize("lora", [None, Lora(4, 4)])
@pytest.mark.parametrize("packed_up_to", [0, math.inf])
def test_activations_are_what_autograd_keeps(architecture, lora, packed_up_to, tiny_model, tokenizer):
    """Counted on the meta device as the bytes that a real forward pass keeps; the structure stays as it is."""
    folder = tiny_model(architecture)
    structure = loading.empty_model(loading.load_config(folder))
    batch = Collator(ReleasedTemplate(tokenizer), "paper", 256).answers_batch(
        [Pair("Why?", "So.")], ["No, no.", "Yes."], True, packed_up_to
    )
    planned = saved_bytes(structure, batch, lora, "fp32", checkpointing=False)
    assert 0 < saved_bytes(structure, batch, lora, "bf16", checkpointing=False) < planned
    assert 0 < saved_bytes(structure, batch, lora, "fp32", checkpointing=True) < planned
    assert all(weight.is_meta and weight.requires_grad for weight in structure.parameters())

    model = loading.load_model(folder, torch.float32)
    model.set_attn_implementation(TREE)
    adapted = (add_lora(model, lora, "") if lora else model).train()
    kept = {weight.data_ptr() for weight in adapted.parameters()}
    sizes = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in kept:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = batch.model_inputs | {"use_cache": False}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        outputs = model.base_model(**inputs)
    # Plain rows keep their attention's output and log-sums, too.
    assert outputs and planned == pytest.approx(sum(sizes.values()), rel=0.02 if packed_up_to else 0.25)


@pytest.mark.parametrize("lora", ["on", "off"])
def test_rmu_needs_memory_for_the_layers_that_it_computes(lora, tiny_model, tmp_path):
    """Of two layers the first, no logits, and gradients of what is trained only."""
    first, both = (
        prepared(tiny_model("opt"), tmp_path, "--method", "rmu", "--lora", lora, "--rmu_layer", layer).plan
        for layer in ("1", "2")
    )
    assert first.memory["activations"] == pytest.approx(both.memory["activations"] / 2)
    assert first.memory["logits"] == 0 < first.trainable == both.trainable / 2
    assert first.trainable == (2 * 32 * (32 + 32) if lora == "on" else 32 * 64)


def test_a_layer_that_is_not_there_is_refused_before_weights_are_loaded(tiny_model, tmp_path):
    with pytest.raises(UserError, match="this model has 2 layers"):
        prepared(tiny_model("opt"), tmp_path, "--method", "rmu", "--rmu_layer", "3")


def test_logits_that_are_softcapped_are_planned_whole(tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    batch = collator.answers_batch([Pair("Why?", "So it is.")], ["It is not, and it never was."] * 9)
    planned = []
    for cap in (None, 30.0):
        with torch.device("meta"):
            structure = Gemma2ForCausalLM(Gemma2Config(**sizes, vocab_size=90_000, final_logit_softcapping=cap))
        planned.append(_activations({"gd", "rd"}, [StepBatch(batch)], structure, None, "fp32", False)["logits"])
    whole = len(batch.row) * 90_000 * 4
    assert planned[1] - planned[0] == pytest.approx(4 * whole - 1.5 * min(whole, 4 * 90_000 * chunk_rows(90_000)))


@pytest.mark.parametrize(
    ("given", "layer"), [(1, 1), (7.0, 7), (30, 30), (0.25, 8), (0.5, 15), (0.75, 22), (0.99, 30), (0.001, 1)]
)
def test_a_layer_is_a_number_or_a_share_of_the_depth(given, layer):
    assert steered_layer(LlamaConfig(num_hidden_layers=30), given) == layer


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "inf", "nan", "first"])
def test_what_is_no_layer_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--method", "rmu", "--rmu_layer", given])
    assert "a layer from 1, or a share" in capsys.readouterr().err
