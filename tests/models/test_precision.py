"""What `auto` means, and a model that computes in bf16 while its weights are float32."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from harmful_unlearn.models.precision import BF16_INSTRUCTIONS, computing_in, resolve_precision

IDS = torch.arange(5, 45).view(2, 20)


@pytest.mark.parametrize("instruction", [*BF16_INSTRUCTIONS, None])
def test_auto_is_bf16_where_the_cpu_has_instructions_for_it(instruction, monkeypatch):
    found = {"avx2": True, **dict.fromkeys(BF16_INSTRUCTIONS, False), "l2_cache_size": 1024}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found | ({instruction: True} if instruction else {}))
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == ("bf16" if instruction else "fp32")
    assert resolve_precision("bf16", cpu) == "bf16" and resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("auto", torch.device("meta")) == "fp32"


def loss_of(model) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


@pytest.mark.parametrize("architecture", ["opt", "llama", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_computes_as_its_16_bit_copy(architecture, checkpointing, tiny_model):
    """The same loss to the bit, gradients in the float32 weights, two passes of which add up, weights untouched."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).train()
    copied = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with computing_in("bf16", model):
        loss = loss_of(model)
        loss.backward()
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        for parameter in copied.parameters():
            parameter.grad = None
        expected = loss_of(copied)
        expected.backward()
        once = [parameter.grad.float() for parameter in copied.parameters()]
        loss_of(model).backward()
    assert loss == expected
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        if parameter in embeddings:  # rows that are read twice are added up in float32, which is better
            torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=2**-7, atol=1e-4)
        else:
            torch.testing.assert_close(parameter.grad, 2 * gradient)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert loss_of(model) != expected


def test_weights_come_back_after_an_error(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    weights = list(model.parameters())
    with pytest.raises(KeyError), computing_in("bf16", model):
        raise KeyError
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
    with computing_in("fp32", model):
        assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
