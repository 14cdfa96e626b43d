"""The script trains a model of which a part is on disk, or on the CPU beside the device."""

import gc

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from transformers.integrations import accelerate as placing

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.attacks.relearning import FULL, Attacker, Relearning
from harmful_unlearn.models import loading
from harmful_unlearn.models.loading import load_model
from harmful_unlearn.unlearn_harm_new import main
from tests.helpers.models.offloaded import ENDS, HEAD, LAYER, MOST, places
from tests.helpers.models.tiny_pairs import same
from tests.helpers.running.runs import flags, metrics_of


def spread(how, monkeypatch, calls=(1,)):
    """The script loads its models (the first, the second, ...) with a part of them offloaded."""
    load, loaded = loading.load_model, []

    def load_spread(folder, dtype, device_map=None, *more):
        loaded.append(folder)
        if device_map != "auto" or len(loaded) not in calls:
            return load(folder, dtype, None, *more)
        if how == "memory":  # as on the CPU beside a GPU
            model = cpu_offload(load(folder, dtype, None, *more), execution_device=torch.device("cpu"))
            model.hf_device_map = {"model": "cpu", "lm_head": "cpu"}
            return model
        return load(folder, dtype, {"": "disk"} if how == "all" else places(folder, *how), *more)

    monkeypatch.setattr(loading, "load_model", load_spread)


def trained(folder, out, *more):
    """What a run leaves: its harmful model (with LoRA the adapter), its unlearned model, its losses and its log."""
    main(flags(folder, out, *more))
    losses = [{key: value for key, value in row.items() if key != "seconds"} for row in metrics_of(out)]
    harmful = load_file(next((out / "harmful").glob("*model.safetensors")))
    unlearned = load_file(out / "unlearned" / "model.safetensors")
    return harmful, unlearned, losses, (out / "logs" / "run.log").read_text()


def assert_same(run, expected):
    assert same(run[0], expected[0]) and same(run[1], expected[1])
    assert run[2] == expected[2]


@pytest.mark.parametrize(
    "architecture, how, more",
    [
        ("opt", LAYER, ()),
        ("opt", MOST, ("--method", "lands", "--precision", "bf16")),
        pytest.param("opt", "memory", (), marks=pytest.mark.slow),
        ("llama", HEAD, ("--method", "land")),
        ("llama", "all", ("--no_packing", "--variant", "paper")),
        pytest.param("llama", "memory", ("--precision", "bf16"), marks=pytest.mark.slow),
        pytest.param("qwen2", ENDS, ("--precision", "bf16"), marks=pytest.mark.slow),
        ("gemma2", ENDS, ()),  # its logits are more than a product with the LM head
        ("mixtral", MOST, ()),  # the library loads its experts in another layout than the files have
    ],
)
def test_training_is_what_it_is_with_all_weights_in_memory(
    architecture, how, more, base_of, tmp_path, monkeypatch, scratch
):
    base = base_of(architecture)
    more = ["--lora", "on", "--lora_r", "4", *more]
    in_memory = trained(base, tmp_path / "in_memory", *more, "--gradient_checkpointing")
    assert "with --gradient_checkpointing" not in in_memory[3]
    files = {file: file.read_bytes() for file in base.iterdir()}
    spread(how, monkeypatch)
    offloaded = trained(base, tmp_path / "offloaded", *more, "--device_map", "auto")
    assert_same(offloaded, in_memory)
    assert "with --gradient_checkpointing, since" in offloaded[3]
    assert ("plain rows" in offloaded[3]) == ("plain rows" in in_memory[3])
    assert {file: file.read_bytes() for file in base.iterdir()} == files
    gc.collect()
    assert not list(scratch.iterdir())


def test_auto_spills_to_disk_what_does_not_fit(base_of, tmp_path, monkeypatch):
    """Without a GPU, and with memory for less than the model."""
    base = base_of("llama")
    size = (base / "model.safetensors").stat().st_size
    in_memory = trained(base, tmp_path / "in_memory", "--lora", "on", "--gradient_checkpointing")
    monkeypatch.setattr(placing, "get_max_memory", lambda *_: {"cpu": size * 19 // 20})
    model = load_model(base, torch.float32, "auto")
    assert 0 < sum(parameter.is_meta for parameter in model.parameters()) < len(list(model.parameters()))
    assert_same(trained(base, tmp_path / "offloaded", "--lora", "on", "--device_map", "auto"), in_memory)


def test_what_is_trained_must_be_in_memory(base_of, tmp_path, monkeypatch, tokenizer):
    spread(LAYER, monkeypatch)
    with pytest.raises(UserError, match="cannot be trained.*--lora on"):
        main(flags(base_of("opt"), tmp_path, "--lora", "off", "--device_map", "auto"))
    monkeypatch.undo()
    assert not (tmp_path / "harmful").exists()
    loaded = load_model(base_of("opt"), torch.float32, {"": "disk"}), ReleasedTemplate(tokenizer)
    with pytest.raises(UserError, match="cannot be trained"):
        Relearning(lambda: loaded, Attacker(FULL, "", 1e-3), [Pair("Why?", "Because.")] * 2, 0, "fp32").at(1)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_full_fine_tuning_beside_an_offloaded_base(architecture, base_of, tmp_path, monkeypatch):
    """There is no room for the second model, the base."""
    in_memory = trained(base_of(architecture), tmp_path / "in_memory", "--lora", "off")
    spread(MOST, monkeypatch, calls=(2,))
    offloaded = trained(base_of(architecture), tmp_path / "offloaded", "--lora", "off", "--device_map", "auto")
    assert_same(offloaded, in_memory)
    assert "with --gradient_checkpointing" not in offloaded[3]
    monkeypatch.undo()
    spread(LAYER, monkeypatch, calls=(2,))
    with pytest.raises(UserError, match="landing point needs all of it"):
        main(flags(base_of("opt"), tmp_path / "land", "--method", "land", "--lora", "off", "--device_map", "auto"))
