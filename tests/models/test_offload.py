"""Models of which a part is on disk, or on the CPU beside the device: adapters, answers, task vectors."""

import gc
import shutil

import pytest
import torch
from accelerate import cpu_offload
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import main as spot_check
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Asked, Pair
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.evals import evaluated_model
from harmful_unlearn.evals.attacks.relearning import FULL, Attacker, Relearning
from harmful_unlearn.evals.comparison.alpha_sweep import AlphaSweep
from harmful_unlearn.evals.inference.generation import Decoding, Request, generate
from harmful_unlearn.evals.inference.likelihood import answer_nll
from harmful_unlearn.losses.fused_linear import has_plain_head
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.models import loading
from harmful_unlearn.models.loading import enable_gradient_checkpointing, load_model
from harmful_unlearn.models.lora import Lora, add_lora
from harmful_unlearn.models.offload import execution_device
from harmful_unlearn.models.reference import ReferenceModel
from task_vector import TaskVector
from task_vector import main as negate
from tests.helpers.models.offloaded import IDS, LAYER, MOST, places


def test_adapters_are_float32_where_their_layers_compute(base_of):
    model = load_model(base_of("llama"), torch.bfloat16, places(base_of("llama"), *MOST))
    model = add_lora(model, Lora(4, 4), "base")
    parts = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parts) == 8
    assert all(part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)
    assert execution_device(model) == torch.device("cpu") and has_plain_head(model)
    # The meta device stands in for a GPU.
    model = AutoModelForCausalLM.from_pretrained(base_of("opt"))
    assert execution_device(model) == torch.device("cpu")
    model = add_lora(cpu_offload(model, execution_device=torch.device("meta")), Lora(4, 4), "base")
    assert execution_device(model).type == "meta"
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert layers and all(layer.lora_A.default.weight.is_meta for layer in layers)


@pytest.mark.parametrize("base_weights", ["in memory", "offloaded"])
def test_no_offloaded_weight_is_kept_until_the_backward_pass(base_weights, base_of, tokenizer):
    folder = base_of("llama")
    collator = Collator(ReleasedTemplate(tokenizer), "paper", 256)
    batch = StepBatch(
        collator.answers_batch([Pair("Why?", "Because."), Pair("Who?", "Me.")], ["None.", "So."]),
        normal=collator.texts_batch([Pair("What?", "This.")]),
    )
    device_map = places(folder, *MOST) if base_weights == "offloaded" else None
    model = add_lora(load_model(folder, torch.float32, device_map), Lora(4, 4), "base")
    enable_gradient_checkpointing(model, wanted=False)
    frozen = {tuple(part.shape) for part in model.parameters() if part.dim() == 2 and not part.requires_grad}
    objective = Objective(model, {"gd": 1.0, "rd": 1.0, "pd": 1.0}, ReferenceModel(model))
    shapes = set()

    def note(tensor):
        shapes.add(tuple(tensor.shape))
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total, _ = objective(model, batch)
    assert bool(shapes & (frozen | {shape[::-1] for shape in frozen})) == (base_weights == "in memory")
    total.backward()


def test_relearning_with_an_adapter(base_of, tokenizer):
    logits = []
    for device_map in (None, places(base_of("llama"), *MOST)):
        torch.manual_seed(0)
        model = add_lora(load_model(base_of("llama"), torch.float32, device_map), Lora(4, 4), "base")
        loaded, pairs = (model, ReleasedTemplate(tokenizer)), [Pair("Why?", "Because."), Pair("Who?", "Me.")]
        model, _ = Relearning(lambda loaded=loaded: loaded, Attacker(FULL, "", 1e-2), pairs, 0, "fp32").at(3)
        logits.append(model(input_ids=IDS).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


# --- answers and task vectors ---------------------------------------------------------------------


def answers(model, template):
    questions = ["How do I hide a gnome?", "Why is the sky blue?"]
    requests = [Request(Asked(q), how, (i,)) for how in (Decoding(), Decoding(0.9)) for i, q in enumerate(questions)]
    generated = [answer for batch in generate(model, template, 6, 100, requests) for answer in batch]
    return generated, answer_nll(model, Collator(template, "paper", 256), [Pair("Why?", "Because.")], "")


@pytest.mark.parametrize("architecture", ["opt", "llama", "mixtral"])
def test_the_evaluation_gets_the_same_answers(architecture, base_of):
    folder = base_of(architecture)
    expected = answers(*evaluated_model.load_model(folder, "fp32"))
    for device_map in (places(folder, *LAYER), places(folder, *MOST), {"": "disk"}):
        model, template = evaluated_model.load_model(folder, "fp32", device_map)
        assert any(parameter.is_meta for parameter in model.parameters())
        assert answers(model, template) == expected


@pytest.mark.parametrize("unlearned", ["model", pytest.param("adapter", marks=pytest.mark.slow)])
def test_the_spot_check_prints_the_same(unlearned, base_of, tmp_path, monkeypatch, capsys):
    base = base_of("llama")
    torch.manual_seed(0)
    model = add_lora(AutoModelForCausalLM.from_pretrained(base), Lora(4, 4), str(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1.0)
    model.save_pretrained(tmp_path / "harmful")
    out = "--adapter_output" if unlearned == "adapter" else "--output"
    negate(["--base", str(base), "--finetuned", str(tmp_path / "harmful"), out, str(tmp_path / "unlearned")])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    command = ["--base", str(base), "--unlearned", str(tmp_path / "unlearned"), "--normal_prompt", "Why?"]
    spot_check.main(command)
    expected, before = capsys.readouterr().out, set(tmp_path.rglob("*"))
    files = {file: file.read_bytes() for file in base.iterdir()}
    load = loading.load_model
    for on_disk in (LAYER, MOST):
        monkeypatch.setattr(
            loading, "load_model", lambda folder, dtype, _, disk=on_disk: load(folder, dtype, places(folder, *disk))
        )
        spot_check.main([*command, "--device_map", "auto"])
        assert capsys.readouterr().out == expected
    assert set(tmp_path.rglob("*")) == before
    assert {file: file.read_bytes() for file in base.iterdir()} == files


def test_all_alphas_in_a_model_on_disk(base_of, tmp_path, scratch):
    base = base_of("llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "harmful")
    shutil.copyfile(base / "config.json", tmp_path / "harmful" / "config.json")

    def logits(device_map, alpha):
        sweep = AlphaSweep(
            base, [tmp_path / "harmful"], lambda folder: evaluated_model.load_model(folder, "fp32", device_map)
        )
        sweep.at(3.0)
        return sweep.at(alpha)[0](input_ids=IDS).logits

    assert torch.equal(logits(None, 0.5), logits(places(base, *MOST), 0.5))
    gc.collect()
    assert not list(scratch.iterdir())


def test_task_vectors_of_experts_on_disk(base_of, scratch):
    """Their offloaded weights are in temporary files of the model, which its copies read, too."""
    base = load_model(base_of("mixtral"), torch.float32)
    harmful = load_model(base_of("mixtral"), torch.float32)
    with torch.no_grad():
        for parameter in harmful.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tau = TaskVector(base, harmful)
    expected = (-tau).apply_to(base)(input_ids=IDS).logits
    spread_out = load_model(base_of("mixtral"), torch.float32, places(base_of("mixtral"), *MOST))
    unlearned = (-tau).apply_to(spread_out)
    name = next(name for name in tau.vector if "experts" in name)
    again = TaskVector(vector={name: 0 * tau.vector[name]}, partial=True).apply_to(unlearned)
    del spread_out, unlearned
    gc.collect()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    del again
    gc.collect()
    assert not list(scratch.iterdir())
