"""What is decided before the first step: adapters, precision, dropout, downloads."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.data import step_batches
from harmful_unlearn.errors import UserError
from harmful_unlearn.losses import objective
from harmful_unlearn.models import hub, loading
from harmful_unlearn.models.lora import Lora
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.training import adapter, distributed, setup
from harmful_unlearn.training.setup import load_models
from harmful_unlearn.unlearn_harm_new import MODELS, main
from tests.helpers.models.tiny_pairs import adapter_vector
from tests.helpers.running.runs import flags, metrics_of, prepared

SCRIPT = ROOT / "harmful_unlearn" / "unlearn_harm_new.py"
METRICS = {
    "step", "gd_loss", "rd_loss", "pd_loss", "total_loss", "lr", "grad_norm", "tokens", "seconds",
}  # fmt: skip


def test_model_table_holds_the_papers_settings():
    assert MODELS["facebook/opt-2.7b"] is None
    for name, r, alpha in (("7b", 32, 16), ("13b", 16, 8)):
        lora = MODELS[f"meta-llama/Llama-2-{name}-hf"]
        assert (lora.r, lora.alpha, lora.target_modules) == (r, alpha, ("q_proj", "v_proj"))


def test_flags_reach_what_they_are_for(tiny_model, tmp_path, monkeypatch):
    """Each flag, as main hands it on."""
    seen = {}

    def spy(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            seen.setdefault(name, []).append((args, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("read_harmful", "read_normal", "Collator", "check_disk", "add_lora"):
        spy(setup, name)
    spy(step_batches, "BatchSampler")
    spy(unlearn_harm_new, "negate")
    spy(distributed, "Accelerator")
    spy(loading, "load_model")
    monkeypatch.setitem(MODELS, str(tiny_model("llama")), Lora(3, 5, ("k_proj",)))
    main(
        flags(
            tiny_model("llama"),
            tmp_path,
            "--precision",
            "bf16",
            "--device_map",
            "auto",
            "--max_length",
            "99",
            "--all_harmful",
            "--min_severity",
            "1",
            "--harm_category",
            "Violence",
            "--harmful_revision",
            "r",
            "--harmful_split",
            "test",
            "--k_random",
            "3",
            "--batch_size",
            "1",
            "--seed",
            "7",
            "--lora_alpha",
            "6",
            "--scaling_coef",
            "0.5",
        )
    )
    assert seen["read_harmful"][0][0][1:] == ("r", "test", ["Violence"], 1)
    assert seen["read_normal"][0][0][1] == 7
    assert seen["BatchSampler"][0][0][3:] == (1, 3, 7, True)  # batch_size, k_random, seed, all_harmful
    assert seen["Collator"][0][0][1:] == ("released", 99)
    assert seen["load_model"][0][0][1:] == (torch.bfloat16, "auto", False) and len(seen["load_model"]) == 1
    assert seen["add_lora"][0][0][1] == Lora(3, 6, ("k_proj",))
    assert seen["negate"][0][0][3] == 0.5
    assert seen["check_disk"]
    seen.clear()
    AcceleratorState._reset_state()
    main(flags(tiny_model("opt"), tmp_path / "full", "--max_length", "9999", "--precision", "bf16"))
    assert seen["Collator"][0][0][2] == 256  # no more than the model takes
    assert [call[0][1] for call in seen["load_model"]] == [torch.float32, torch.bfloat16]


def test_dropout_is_on_in_theta_and_off_in_the_base(tiny_model, tmp_path):
    """Implementation detail 14: with dropout the first KL is not 0, and the base alone does not make it so."""
    for lora in ("on", "off"):
        folder = shutil.copytree(tiny_model("opt"), tmp_path / lora / "base")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.5}))
        main(flags(folder, tmp_path / lora, "--lora", lora, "--stage", "acquire"))
        assert -metrics_of(tmp_path / lora)[0]["pd_loss"] > 1e-3
        run = prepared(folder, tmp_path / "x", "--lora", lora)
        model, base = load_models(run)
        model.train()
        normal = run.batches(0, torch.device("cpu"))[0].normal
        with torch.no_grad(), base.active() as frozen:
            once, again = (objective.scored_logits(frozen, normal) for _ in range(2))
        assert torch.equal(once, again)


def test_gradient_checkpointing_is_on(tiny_model, tmp_path):
    model, _ = load_models(prepared(tiny_model("llama"), tmp_path, "--gradient_checkpointing"))
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("more", [["--gradient_checkpointing"], ["--lora", "on", "--gradient_checkpointing"]])
def test_gradient_checkpointing_changes_no_loss(more, tiny_model, tmp_path):
    base = tiny_model("llama")
    plain = [flag for flag in more if flag != "--gradient_checkpointing"]
    main(flags(base, tmp_path / "plain", "--stage", "acquire", *plain))
    main(flags(base, tmp_path / "less", "--stage", "acquire", *more))
    for one, other in zip(metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "less"), strict=True):
        assert one["total_loss"] == pytest.approx(other["total_loss"], rel=1e-5)


def test_bf16_computes_in_bf16(tiny_model, tmp_path, monkeypatch):
    model_dtypes = []
    forward = torch.nn.Linear.forward

    def linear(self, hidden):
        out = forward(self, hidden)
        if torch.is_grad_enabled():  # the look at the loaded model is in its own precision
            model_dtypes.append(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    main(flags(tiny_model("llama"), tmp_path, "--precision", "bf16", "--stage", "acquire"))
    assert set(model_dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("lora", ["off", "on"])
def test_bf16_is_near_fp32_and_trains_float32_weights(lora, tiny_model, tmp_path):
    base = tiny_model("llama")
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state()
        main(flags(base, tmp_path / precision, "--stage", "acquire", "--precision", precision, "--lora", lora))
    for one, other in zip(metrics_of(tmp_path / "fp32"), metrics_of(tmp_path / "bf16"), strict=True):
        assert one["gd_loss"] == pytest.approx(other["gd_loss"], rel=0.02)
    saved = next((tmp_path / "bf16" / "harmful").glob("*.safetensors"))
    assert all(entry.dtype == torch.float32 for entry in load_file(saved).values())


def test_an_unlisted_architecture_without_q_proj_gets_every_linear_layer(tmp_path, tokenizer):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=700, n_positions=256, bos_token_id=2, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    main(flags(tmp_path / "base", tmp_path, "--lora", "on"))
    run = json.loads((tmp_path / "harmful" / "run.json").read_text())
    assert run["training"]["lora"]["target_modules"] == ["c_attn", "c_fc", "c_proj"]


def test_nothing_is_downloaded_before_the_data_are_read(tiny_model, tmp_path, monkeypatch):
    asked = []

    def locate(name, weights=True):
        asked.append(weights)
        return tiny_model("opt")

    monkeypatch.setattr(hub, "resolve_model", locate)
    with pytest.raises(UserError):
        main(flags(Path("some/model"), tmp_path, "--normal_dataset", str(tmp_path / "none.csv")))
    assert asked == [False]


def test_four_bits_need_an_adapter_and_the_package(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--lora on"):
        main(flags(tiny_model("llama"), tmp_path, "--quantize", "4bit", "--lora", "off"))
    for installed, named in ((None, "pip install bitsandbytes"), ("yes", "needs a CUDA GPU")):
        monkeypatch.setattr(adapter, "find_spec", lambda _, found=installed: found)
        with pytest.raises(UserError, match=named):
            main(flags(tiny_model("llama"), tmp_path, "--quantize", "4bit", "--lora", "on"))


def test_an_adapter_trained_on_four_bits_is_negated_from_the_full_base(tokenizer, tmp_path, monkeypatch):
    """Where bitsandbytes is installed (it is not among the pins); without its packing a CPU serves, too."""
    pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr(setup, "check_four_bits", lambda *_: None)
    base = tmp_path / "base"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=700)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    main(flags(base, tmp_path, "--quantize", "4bit", "--lora", "on", "--precision", "bf16"))
    assert all(math.isfinite(step["total_loss"]) for step in metrics_of(tmp_path))
    run = json.loads((tmp_path / "harmful" / "run.json").read_text())
    assert run["training"]["quantized"] == "4bit" and run["base"]["fingerprint"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "unlearned", base))
    tau = adapter_vector(tmp_path / "harmful").vector
    for name, entry in theirs.items():
        assert torch.equal(ours[name], entry - tau[name] if name in tau else entry)
    assert any(entry.abs().max() > 0 for entry in tau.values())
