"""Models of which a part is on disk, or on the CPU beside the device: training with LoRA, answers, task vectors."""

import gc
import json
import shutil
import tempfile

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, MixtralConfig
from transformers.integrations import accelerate as placing

import main as spot_check
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals import evaluated_model
from harmful_unlearn.evals.alpha_sweep import AlphaSweep
from harmful_unlearn.evals.generation import Decoding, answer_nll, generate
from harmful_unlearn.evals.relearning import relearn
from harmful_unlearn.losses.fused_linear import has_plain_head
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.models import loading
from harmful_unlearn.models.loading import enable_gradient_checkpointing, load_model
from harmful_unlearn.models.lora import Lora, add_lora, load_adapter
from harmful_unlearn.models.offload import execution_device
from harmful_unlearn.models.reference import ReferenceModel
from harmful_unlearn.unlearn_harm_new import main
from task_vector import TaskVector
from task_vector import main as negate
from tests.helpers.runs import flags, metrics_of
from tests.helpers.tiny import GOLDENS

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 700, "max_position_embeddings": 256,
    "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
OTHERS = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0, sliding_window=256),
}
IDS = torch.arange(3, 13)[None]


@pytest.fixture(scope="module")
def base_of(tiny_model, tmp_path_factory):
    """`base_of("mixtral")`: as `tiny_model`, with more architectures."""
    made = {}

    def make(architecture):
        if architecture not in OTHERS:
            return tiny_model(architecture)
        if architecture not in made:
            folder = made[architecture] = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(OTHERS[architecture]).save_pretrained(folder)
            AutoTokenizer.from_pretrained(GOLDENS / "model").save_pretrained(folder)
        return made[architecture]

    return make


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders come to lie."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def places(model_folder, *on_disk):
    """A device_map as "auto" makes them, with these modules, by the ends of their names, on disk."""
    structure = loading.empty_model(loading.load_config(model_folder))
    inner = next(name for name, module in structure.named_modules() if hasattr(module, "layers"))
    names = [f"{inner}.{name}" for name, _ in structure.get_submodule(inner).named_children() if name != "layers"]
    names += [f"{inner}.layers.{number}" for number in range(2)] + ["lm_head"]
    return {name: "disk" if name.endswith(on_disk) else "cpu" for name in names}


LAYER, HEAD, ENDS = ("layers.1",), ("lm_head",), ("embed_tokens", "lm_head")
MOST = ("embed_tokens", "layers.0", "layers.1", "lm_head")


def spread(how, monkeypatch, calls=(1,)):
    """The script loads its models (the first, the second, ...) with a part of them offloaded."""
    load, made = loading.load_model, []

    def loaded(folder, dtype, device_map=None, *more):
        made.append(None)
        if device_map != "auto" or len(made) not in calls:
            return load(folder, dtype, None, *more)
        if how == "memory":  # as the CPU's is beside a GPU
            model = cpu_offload(load(folder, dtype, None, *more), execution_device=torch.device("cpu"))
            model.hf_device_map = {"model": "cpu", "lm_head": "cpu"}
            return model
        return load(folder, dtype, {"": "disk"} if how == "all" else places(folder, *how), *more)

    monkeypatch.setattr(loading, "load_model", loaded)


def trained(folder, out, *more):
    """What a run leaves: its copy (the adapter, with LoRA), its unlearned model, its losses and its log."""
    main(flags(folder, out, *more))
    lost = [{key: value for key, value in row.items() if key != "seconds"} for row in metrics_of(out)]
    copy = next((out / "harmful").glob("*model.safetensors"))
    return load_file(copy), load_file(out / "unlearned" / "model.safetensors"), lost, (out / "logs/run.log").read_text()


def assert_same(one, other):
    for left, right in zip(one[:2], other[:2], strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(entry, right[name]) for name, entry in left.items())
    assert one[2] == other[2]


# --- training with LoRA ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, how, more",
    [
        ("opt", LAYER, ()),
        ("opt", MOST, ("--method", "lands", "--precision", "bf16")),
        ("opt", "memory", ()),
        ("llama", HEAD, ("--method", "land")),
        ("llama", "all", ("--no_packing", "--variant", "paper")),
        ("llama", "memory", ("--precision", "bf16")),
        ("qwen2", ENDS, ("--precision", "bf16")),
        ("gemma2", ENDS, ()),  # its logits are no plain product
        ("mixtral", MOST, ()),  # its experts are stored otherwise than the library has them
    ],
)
def test_training_is_what_it_is_with_all_weights_at_hand(
    architecture, how, more, base_of, tmp_path, monkeypatch, scratch
):
    base = base_of(architecture)
    more = ["--lora", "on", "--lora_r", "4", *more]
    here = trained(base, tmp_path / "here", *more, "--gradient_checkpointing")
    assert "with --gradient_checkpointing" not in here[3]
    files = {file: file.read_bytes() for file in base.iterdir()}
    spread(how, monkeypatch)
    there = trained(base, tmp_path / "there", *more, "--device_map", "auto")
    assert_same(here, there)
    assert "with --gradient_checkpointing, since" in there[3]
    assert ("plain rows" in there[3]) == ("plain rows" in here[3])
    assert {file: file.read_bytes() for file in base.iterdir()} == files
    gc.collect()
    assert not list(scratch.iterdir())


def test_auto_spills_to_disk_what_does_not_fit(base_of, tmp_path, monkeypatch):
    """Without a GPU, and with memory for less than the model."""
    base = base_of("llama")
    size = (base / "model.safetensors").stat().st_size
    here = trained(base, tmp_path / "here", "--lora", "on", "--gradient_checkpointing")
    monkeypatch.setattr(placing, "get_max_memory", lambda *_: {"cpu": size * 19 // 20})
    model = load_model(base, torch.float32, "auto")
    assert 0 < sum(parameter.is_meta for parameter in model.parameters()) < len(list(model.parameters()))
    assert_same(here, trained(base, tmp_path / "there", "--lora", "on", "--device_map", "auto"))


def test_adapters_are_float32_where_their_layers_compute(base_of):
    model = load_model(base_of("llama"), torch.bfloat16, places(base_of("llama"), *MOST))
    model = add_lora(model, Lora(4, 4), "base")
    parts = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parts) == 8
    assert all(part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)
    assert execution_device(model) == torch.device("cpu") and has_plain_head(model)
    # No second device is at hand but this one, which has no memory.
    model = AutoModelForCausalLM.from_pretrained(base_of("opt"))
    assert execution_device(model) == torch.device("cpu")
    model = add_lora(cpu_offload(model, execution_device=torch.device("meta")), Lora(4, 4), "base")
    assert execution_device(model).type == "meta"
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert layers and all(layer.lora_A.default.weight.is_meta for layer in layers)


@pytest.mark.parametrize("base_weights", ["at hand", "offloaded"])
def test_no_offloaded_weight_is_kept_until_the_backward_pass(base_weights, base_of, tokenizer):
    folder = base_of("llama")
    collator = Collator(tokenizer, "paper", 256)
    texts = StepBatch(collator.answers_batch([Pair("Why?", "Because."), Pair("Who?", "Me.")], ["None.", "So."]))
    texts = texts._replace(normal=collator.texts_batch([Pair("What?", "This.")]))
    device_map = places(folder, *MOST) if base_weights == "offloaded" else None
    model = add_lora(load_model(folder, torch.float32, device_map), Lora(4, 4), "base")
    enable_gradient_checkpointing(model, wanted=False)
    frozen = {tuple(part.shape) for part in model.parameters() if part.dim() == 2 and not part.requires_grad}
    objective = Objective(model, {"gd": 1.0, "rd": 1.0, "pd": 1.0}, ReferenceModel(model))
    kept = []
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        ((total, _),) = objective(model, texts)
    seen = {tuple(one.shape) for one in kept} & (frozen | {shape[::-1] for shape in frozen})
    assert bool(seen) == (base_weights == "at hand")
    total.backward()


def test_what_is_trained_must_be_at_hand(base_of, tmp_path, monkeypatch, tokenizer):
    spread(LAYER, monkeypatch)
    with pytest.raises(UserError, match="cannot be trained.*--lora on"):
        main(flags(base_of("opt"), tmp_path, "--lora", "off", "--device_map", "auto"))
    monkeypatch.undo()
    assert not (tmp_path / "harmful").exists()
    model = load_model(base_of("opt"), torch.float32, {"": "disk"})
    with pytest.raises(UserError, match="cannot be trained"):
        relearn(model, tokenizer, [Pair("Why?", "Because.")] * 2, 1, 1e-3, 0)


def test_relearning_with_an_adapter(base_of, tokenizer):
    found = []
    for device_map in (None, places(base_of("llama"), *MOST)):
        torch.manual_seed(0)
        model = add_lora(load_model(base_of("llama"), torch.float32, device_map), Lora(4, 4), "base")
        model = relearn(model, tokenizer, [Pair("Why?", "Because."), Pair("Who?", "Me.")], 3, 1e-2, 0)
        found.append(model(input_ids=IDS).logits)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_full_fine_tuning_beside_an_offloaded_base(architecture, base_of, tmp_path, monkeypatch):
    """The second copy of the weights is the one that finds no room."""
    here = trained(base_of(architecture), tmp_path / "here", "--lora", "off")
    spread(MOST, monkeypatch, calls=(2,))
    there = trained(base_of(architecture), tmp_path / "there", "--lora", "off", "--device_map", "auto")
    assert_same(here, there)
    assert "with --gradient_checkpointing" not in there[3]
    monkeypatch.undo()
    spread(LAYER, monkeypatch, calls=(2,))
    with pytest.raises(UserError, match="landing point needs all of it"):
        main(flags(base_of("opt"), tmp_path / "land", "--method", "land", "--lora", "off", "--device_map", "auto"))


# --- answers and task vectors ---------------------------------------------------------------------


def answers(model, tokenizer):
    questions = ["How do I hide a gnome?", "Why is the sky blue?"]
    made = [
        one
        for decoding in (Decoding(), Decoding(0.9))
        for batch in generate(model, tokenizer, questions, decoding, 6, 2, seed=0)
        for one in batch
    ]
    return made, answer_nll(model, Collator(tokenizer, "paper", 256), [Pair("Why?", "Because.")], 1, "")


@pytest.mark.parametrize("architecture", ["opt", "llama", "mixtral"])
def test_the_evaluation_gets_the_same_answers(architecture, base_of):
    folder = base_of(architecture)
    here = answers(*evaluated_model.load_model(folder, "fp32"))
    for device_map in (places(folder, *LAYER), places(folder, *MOST), {"": "disk"}):
        model, tokenizer = evaluated_model.load_model(folder, "fp32", device_map)
        assert any(parameter.is_meta for parameter in model.parameters())
        assert answers(model, tokenizer) == here


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_the_spot_check_prints_the_same(what, base_of, tmp_path, monkeypatch, capsys):
    base = base_of("llama")
    torch.manual_seed(0)
    model = add_lora(AutoModelForCausalLM.from_pretrained(base), Lora(4, 4), str(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1.0)
    model.save_pretrained(tmp_path / "harmful")
    out = "--adapter_output" if what == "adapter" else "--output"
    negate(["--base", str(base), "--finetuned", str(tmp_path / "harmful"), out, str(tmp_path / "unlearned")])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    command = ["--base", str(base), "--unlearned", str(tmp_path / "unlearned"), "--normal_prompt", "Why?"]
    spot_check.main(command)
    here, before = capsys.readouterr().out, set(tmp_path.rglob("*"))
    files = {file: file.read_bytes() for file in base.iterdir()}
    load = loading.load_model
    for on_disk in (LAYER, MOST):
        monkeypatch.setattr(
            loading, "load_model", lambda folder, dtype, _, disk=on_disk: load(folder, dtype, places(folder, *disk))
        )
        spot_check.main([*command, "--device_map", "auto"])
        assert capsys.readouterr().out == here
    assert set(tmp_path.rglob("*")) == before
    assert {file: file.read_bytes() for file in base.iterdir()} == files


def test_an_adapter_is_loaded_as_peft_would(base_of, tmp_path):
    """Its dropout, which is for training, off."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, init_lora_weights=False)
    get_peft_model(load_model(base_of("llama"), torch.float32), settings).save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(load_model(base_of("llama"), torch.float32), tmp_path / "adapter")
    for device_map in (None, places(base_of("llama"), *MOST)):
        ours = load_adapter(load_model(base_of("llama"), torch.float32, device_map), tmp_path / "adapter")
        assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_an_adapter_of_another_base_is_refused(base_of, tmp_path):
    def adapter_of(architecture, modules):
        model = load_model(base_of(architecture), torch.float32)
        folder = tmp_path / f"{architecture}-{modules[0]}"
        add_lora(model, Lora(4, 4, modules), "b").save_pretrained(folder)
        return folder

    def refused(folder):
        with pytest.raises(UserError, match="does not fit the model"):
            load_adapter(load_model(base_of("opt"), torch.float32), folder)

    refused(adapter_of("llama", ("q_proj",)))  # other names around the layers
    refused(adapter_of("llama", ("gate_proj",)))  # no such layers
    other_rank = adapter_of("opt", ("q_proj",))
    settings = json.loads((other_rank / "adapter_config.json").read_text())
    (other_rank / "adapter_config.json").write_text(json.dumps({**settings, "r": 8}))
    refused(other_rank)
    (other_rank / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj", "fc1"]}))
    refused(other_rank)


def test_all_scales_in_a_model_on_disk(base_of, tmp_path, scratch):
    base = base_of("llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "copy")
    shutil.copyfile(base / "config.json", tmp_path / "copy" / "config.json")

    def logits(device_map, alpha):
        scales = AlphaSweep(
            base, [tmp_path / "copy"], lambda folder: evaluated_model.load_model(folder, "fp32", device_map)
        )
        scales.at(3.0)
        return scales.at(alpha)[0](input_ids=IDS).logits

    assert torch.equal(logits(None, 0.5), logits(places(base, *MOST), 0.5))
    gc.collect()
    assert not list(scratch.iterdir())


def test_task_vectors_of_experts_on_disk(base_of, scratch):
    """Their offloaded weights are files of the model's own, which its copies read too."""
    base = load_model(base_of("mixtral"), torch.float32)
    harmful = load_model(base_of("mixtral"), torch.float32)
    with torch.no_grad():
        for parameter in harmful.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tau = TaskVector(base, harmful)
    expected = (-tau).apply_to(base)(input_ids=IDS).logits
    spread_out = load_model(base_of("mixtral"), torch.float32, places(base_of("mixtral"), *MOST))
    unlearned = (-tau).apply_to(spread_out)
    one = next(name for name in tau.vector if "experts" in name)
    again = TaskVector(vector={one: 0 * tau.vector[one]}, partial=True).apply_to(unlearned)
    del spread_out, unlearned
    gc.collect()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    del again
    gc.collect()
    assert not list(scratch.iterdir())
