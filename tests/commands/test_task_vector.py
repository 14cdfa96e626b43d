"""Task vectors in memory: the released figures, the laws of arithmetic, dispatched models; and the command."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import task_vector
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate
from task_vector import TaskVector
from tests.helpers.models.tiny import GOLDENS
from tests.helpers.models.tiny_pairs import (
    CONFIGS,
    IDS,
    LORA,
    adapter,
    make,
    negated_weights,
    same,
    saved,
    tuned,
    weights,
)


def test_golden_in_memory():
    base = AutoModelForCausalLM.from_pretrained(GOLDENS / "model")
    unlearned = (-TaskVector(base, load_file(GOLDENS / "harmful_model.safetensors"))).apply_to(base)
    golden = load_file(GOLDENS / "unlearned_model.safetensors")
    state = unlearned.state_dict()
    assert all(torch.equal(state[name], golden[name]) for name in golden)
    assert unlearned.lm_head.weight is unlearned.model.decoder.embed_tokens.weight


# --- arithmetic -----------------------------------------------------------------------------------


def test_arithmetic_laws():
    base = make("opt")
    a, b = TaskVector(base, tuned(base, 1)), TaskVector(base, tuned(base, 2))
    name = "model.decoder.layers.0.fc1.weight"
    torch.testing.assert_close((a + b).vector[name], a.vector[name] + b.vector[name])
    assert same(sum([a, b]).vector, (a + b).vector)
    assert same((a - b).vector, (a + -b).vector)
    assert same((2 * a).vector, (a + a).vector) and same((a * 2).vector, (2 * a).vector)
    assert same((-1 * -a).vector, a.vector)
    assert not (a - a).vector[name].any() and a.vector[name].any()
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError):
        a * "2"


def test_apply_returns_a_copy_unless_asked():
    base = make("qwen2")
    other = tuned(base)
    before = {name: entry.clone() for name, entry in base.state_dict().items()}
    tau = TaskVector(base, other)
    there = tau.apply_to(base)
    assert same(base.state_dict(), before)
    for name, entry in other.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], entry)
    half = tau.apply_to(base, scaling_coef=0.5).state_dict()
    torch.testing.assert_close(half["model.norm.weight"], (before["model.norm.weight"] + other.model.norm.weight) / 2)
    assert tau.apply_to(base, in_place=True) is base
    assert same(base.state_dict(), there.state_dict())


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_tied_weights_are_changed_once_and_stay_tied(architecture):
    base = make(architecture)
    other = tuned(base)
    there = TaskVector(base, other).apply_to(base)
    embeddings = there.get_input_embeddings().weight
    assert there.get_output_embeddings().weight is embeddings
    torch.testing.assert_close(embeddings, other.get_input_embeddings().weight)
    # State dicts whose two names share no storage any more, as files may hold them.
    apart = {name: entry.clone() for name, entry in other.state_dict().items()}
    again = TaskVector({name: entry.clone() for name, entry in base.state_dict().items()}, apart).apply_to(base)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    torch.testing.assert_close(again.get_input_embeddings().weight, embeddings)


def test_integer_entries_are_left_alone():
    base, other = make("opt"), make("opt", seed=1)
    base.register_buffer("steps", torch.tensor([1, 2]))
    base.register_buffer("mask", torch.tensor([1], dtype=torch.uint8))
    other.register_buffer("steps", torch.tensor([5, 5]))
    tau = TaskVector(base, other)
    assert not {"steps", "mask"} & tau.vector.keys()
    assert tau.apply_to(base).steps.tolist() == [1, 2]


def test_16_bit_is_rounded_once():
    base = make("opt", dtype=torch.bfloat16)
    other = tuned(base)
    tau = TaskVector(base, other)
    name = "model.decoder.layers.1.fc2.weight"
    assert tau.vector[name].dtype == torch.float32
    b, f = base.state_dict()[name], other.state_dict()[name]
    exact = (b.double() - 0.7 * (f.double() - b.double())).bfloat16()
    ours = (-tau).apply_to(base, 0.7).state_dict()[name]
    assert ours.dtype == torch.bfloat16
    assert (ours != exact).float().mean() < 1e-3  # float32 may differ from float64 at a tie
    assert torch.equal(tau.apply_to(base).state_dict()[name], f)


def test_mismatches_are_listed():
    base = make("opt")
    state = dict(base.state_dict())
    state.pop("model.decoder.layers.0.fc1.weight")
    state["new.weight"] = torch.zeros(2)
    state["model.decoder.layers.1.fc1.bias"] = torch.zeros(3)
    with pytest.raises(UserError) as error:
        TaskVector(base, state)
    for part in (
        "1 missing: model.decoder.layers.0.fc1.weight",
        "1 extra: new.weight",
        "1 of another shape: model.decoder.layers.1.fc1.bias ((3,), not (32,))",
    ):
        assert part in str(error.value)
    before = {name: entry.clone() for name, entry in base.state_dict().items()}
    with pytest.raises(UserError, match="35 missing.*, \\.\\.\\."):
        TaskVector(vector={"model.decoder.layers.0.fc1.weight": torch.ones(32, 16)}).apply_to(base, in_place=True)
    assert same(base.state_dict(), before)
    a, b = (TaskVector(vector={name: torch.ones(1)}) for name in "ab")
    with pytest.raises(UserError, match="1 missing: a; 1 extra: b"):
        a + b


def test_save_and_load(tmp_path):
    base = make("llama", dtype=torch.float16)
    tau = TaskVector(base, tuned(base))
    tau.save(tmp_path / "v")
    again = TaskVector.load(tmp_path / "v")
    assert same(again.vector, tau.vector) and again.partial is False
    odd = TaskVector(
        vector={"a": torch.tensor(2.0), "b": torch.zeros(0, 3), "c": torch.ones(3, dtype=torch.float64)}, partial=True
    )
    odd.save(tmp_path / "odd")
    again = TaskVector.load(tmp_path / "odd")
    assert same(again.vector, odd.vector) and again.partial
    with pytest.raises(UserError, match="not empty"):
        tau.save(tmp_path / "odd")


# --- models dispatched over devices ---------------------------------------------------------------


def dispatched(model, how, folder):
    """The model's weights spread over CPU memory and disk by accelerate or transformers."""
    if how == "cpu_offload":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "all on disk":
        path = saved(model, folder / "model")
        return AutoModelForCausalLM.from_pretrained(path, device_map={"": "disk"}, offload_folder=folder / "offload")
    disk = "model.layers.1" if hasattr(model.model, "layers") else "model.decoder.layers.1"
    places = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    places = {name: place for name, place in places.items() if not name.startswith(disk)}
    return dispatch_model(model, {**places, disk: "disk"}, main_device="cpu", offload_dir=folder / "offload")


@pytest.mark.parametrize("how", ["all on disk", "layer on disk", "cpu_offload"])
@pytest.mark.parametrize("architecture", ["opt", "qwen2"])
def test_dispatched_models(architecture, how, tmp_path):
    base = make(architecture)
    harmful = tuned(base)
    expected = (-TaskVector(base, harmful)).apply_to(base)(IDS).logits
    original = base(IDS).logits
    spread = dispatched(make(architecture), how, tmp_path / "base")
    spread_harmful = dispatched(tuned(make(architecture)), how, tmp_path / "harmful")
    assert any(parameter.is_meta for parameter in spread.parameters())
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    tau = TaskVector(spread, spread_harmful)
    unlearned = (-tau).apply_to(spread)
    torch.testing.assert_close(unlearned(IDS).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(spread(IDS).logits, original, rtol=0, atol=1e-6)
    third = tau.apply_to(unlearned)
    (-tau).apply_to(spread, in_place=True)
    torch.testing.assert_close(spread(IDS).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(third(IDS).logits, original, rtol=0, atol=1e-5)
    one = next(name for name in tau.vector if "layers.1" in name)
    fourth = TaskVector(vector={one: 0 * tau.vector[one]}, partial=True).apply_to(unlearned)
    del unlearned, third
    gc.collect()  # the fourth still reads files that its parent wrote
    torch.testing.assert_close(fourth(IDS).logits, expected, rtol=0, atol=1e-6)
    assert all(file.read_bytes() == content for file, content in files.items())
    del spread, fourth
    gc.collect()
    assert not list(tmp_path.rglob("task-vector-*"))


def test_tied_head_on_disk_and_a_file_without_it(tmp_path):
    base = make("opt")
    state = tuned(base).state_dict()
    del state["lm_head.weight"]
    spread = dispatched(make("opt"), "all on disk", tmp_path)
    unlearned = (-TaskVector(spread, state)).apply_to(spread)
    expected = (-TaskVector(base, state)).apply_to(base)
    torch.testing.assert_close(unlearned(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-6)


def test_copy_of_a_dispatched_model_has_no_strings_to_it():
    base = make("opt")
    places = {name: "cpu" for name, module in base.named_modules() if not list(module.children())}
    dispatch_model(base, places, force_hooks=True)
    there = TaskVector(base, base).apply_to(base)
    there.to(torch.float64)
    assert there.dtype == torch.float64 and base.dtype == torch.float32


def test_meta_without_values_is_refused():
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(CONFIGS["opt"])
    with pytest.raises(UserError, match="load the model's weights"):
        TaskVector(empty, make("opt"))
    with pytest.raises(UserError, match="not its state dict"):
        TaskVector(empty.state_dict(), make("opt"))


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """(base folder, fine-tuned folder), OPT in float32."""
    model = make("opt")
    return saved(model, tmp_path / "base"), saved(tuned(model), tmp_path / "tuned")


def run(*arguments, cwd):
    script = Path(task_vector.__file__)
    return subprocess.run([sys.executable, script, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def test_command(tmp_path, pair):
    done = run("--base", "base", "--finetuned", "tuned", "--output", "out", "--save_vector", "v", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "out"), negated_weights(pair, tmp_path / "ours"))
    failed = run("--base", "base", "--finetuned", "nowhere/at/all", "--output", "o2", cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr


def test_command_sums_and_vectors(tmp_path, pair):
    base, other = map(str, pair)
    out = ["--output", str(tmp_path / "out"), "--overwrite"]
    task_vector.main(["--base", base, "--finetuned", other, other, "--coefs", "1", "-0.5", *out])
    negate(pair[0], [(pair[1], 1.0), (pair[1], -0.5)], tmp_path / "ours", 1.0)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "ours"))
    task_vector.main(["--base", base, "--finetuned", other, "--save_vector", str(tmp_path / "v")])
    task_vector.main(["--base", base, "--vector", str(tmp_path / "v"), "--scaling_coef", "0.5", *out])
    for name, entry in weights(tmp_path / "ours").items():
        torch.testing.assert_close(weights(tmp_path / "out")[name], entry)
    with pytest.raises(UserError, match="1 --coefs for 2"):
        task_vector.main(["--base", base, "--finetuned", other, other, "--coefs", "1", *out])
    with pytest.raises(UserError, match="give it as --vector"):
        task_vector.main(["--base", str(tmp_path / "v"), "--finetuned", other, "--output", str(tmp_path / "n")])
    with pytest.raises(SystemExit):
        task_vector.main(["--base", base, "--finetuned", other])


def test_several_alphas_of_the_command(pair, tmp_path):
    given = ["--base", str(pair[0]), "--finetuned", str(pair[1]), "--output", str(tmp_path / "o"), "--scaling_coef"]
    task_vector.main([*given, "0.5", "1.0"])
    assert sorted(folder.name for folder in (tmp_path / "o").iterdir()) == ["alpha-0.5", "alpha-1"]
    for twice in (["1", "1.0"], ["0", "-0.0", "2"]):
        with pytest.raises(UserError, match="given twice"):
            task_vector.main([*given, *twice, "--overwrite"])
    with pytest.raises(UserError, match="not empty"):
        task_vector.main([*given, "2"])


def test_the_command_writes_adapters(tmp_path):
    base = saved(make("opt"), tmp_path / "base")
    folder, _ = adapter(make("opt"), tmp_path / "adapter", **LORA["plain"][1])
    given = ["--base", str(base), "--finetuned", str(folder)]
    out, both = ["--adapter_output", str(tmp_path / "a")], ["--output", str(tmp_path / "o")]
    task_vector.main([*given, *out, *both, "--scaling_coef", "0.5", "2"])
    for alpha in ("0.5", "2"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "o" / f"alpha-{alpha}")(IDS).logits
        untouched = AutoModelForCausalLM.from_pretrained(base)
        ours = PeftModel.from_pretrained(untouched, tmp_path / "a" / f"alpha-{alpha}").eval()(IDS).logits
        torch.testing.assert_close(ours, model, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="not empty"):
        task_vector.main([*given, *out])
    (tmp_path / "full").mkdir()
    full = str(saved(tuned(make("opt")), tmp_path / "full"))
    new = ["--adapter_output", str(tmp_path / "new"), "--output", str(tmp_path / "model")]
    for finetuned, message in (
        ([str(folder)] * 2, "2 models do not make one adapter"),
        ([full], "is not a LoRA adapter"),
    ):
        with pytest.raises(UserError, match=f"{message}.*--output"):
            task_vector.main(["--base", str(base), "--finetuned", *finetuned, *new])
        assert not (tmp_path / "new").exists() and not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="folder of its own"):
        same_place = ["--output", str(tmp_path / "x"), "--adapter_output", str(tmp_path / "x" / "y")]
        task_vector.main([*given, *same_place])
