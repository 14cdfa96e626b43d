"""LoRA adapters: their target modules, and loading a saved one."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from harmful_unlearn.errors import UserError
from harmful_unlearn.models import loading
from harmful_unlearn.models.loading import load_model
from harmful_unlearn.models.lora import Lora, add_lora, check_lora_targets, load_adapter
from tests.helpers.models.offloaded import IDS, MOST, places


def test_lora_target_that_the_model_lacks_names_the_candidates(tiny_model):
    structure = loading.empty_model(loading.load_config(tiny_model("llama")))
    with pytest.raises(UserError, match="no module query.*down_proj.*q_proj"):
        check_lora_targets(structure, Lora(4, 8, ("q_proj", "query")))


def test_an_adapter_is_loaded_as_peft_would(base_of, tmp_path):
    """Its dropout, which is for training, off."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, init_lora_weights=False)
    get_peft_model(load_model(base_of("llama"), torch.float32), settings).save_pretrained(tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(load_model(base_of("llama"), torch.float32), tmp_path / "adapter")
    for device_map in (None, places(base_of("llama"), *MOST)):
        ours = load_adapter(load_model(base_of("llama"), torch.float32, device_map), tmp_path / "adapter")
        assert torch.equal(ours(input_ids=IDS).logits, by_peft(input_ids=IDS).logits)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_there_is_no_warning_that_users_can_do_nothing_about(base_of, tmp_path):
    add_lora(load_model(base_of("llama"), torch.float32), Lora(2, 2), "b").save_pretrained(tmp_path)
    load_adapter(load_model(base_of("llama"), torch.float32), tmp_path)


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
