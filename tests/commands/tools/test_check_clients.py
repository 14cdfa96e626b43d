"""scripts/check_clients.py: transformers and PEFT load what stage 2 writes; another answer and a failure are said."""

import json

import pytest
import torch

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.negate import negate, negate_adapter
from scripts import check_clients
from tests.helpers.models.tiny_pairs import LORA, adapter


@pytest.fixture
def written(tiny_model, tmp_path):
    """base, an unlearned model and an unlearning adapter."""
    base = tiny_model("llama")
    model = check_clients.load(str(base))
    settings = LORA["patterns"][1] | {"r": 8, "lora_alpha": 64, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    harmful, _ = adapter(model, tmp_path / "harmful", **settings)
    config = json.loads((harmful / "adapter_config.json").read_text())
    (harmful / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    negate(base, [(harmful, 1.0)], tmp_path / "model", 1.5)
    negate_adapter(base, [(harmful, 1.0)], tmp_path / "adapter")
    return {"base": str(base), "model": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter")}


def test_transformers_and_peft_load_what_is_written(written, capsys, monkeypatch):
    flags = [word for name, folder in written.items() for word in (f"--{name}", folder)]
    monkeypatch.setitem(check_clients.CLIENTS, "vllm", ("no_such_module", None, None))
    check_clients.main([*flags, "--clients", "transformers", "peft", "peft_auto", "vllm"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    outcomes = {row[0].strip("| "): [cell.strip(" |") for cell in row[-2:]] for row in rows}
    same = "same answer"
    assert outcomes == {"transformers": [same, same], "peft": ["", same], "peft_auto": ["", same], "vllm": ["", ""]}


def test_a_model_like_its_base_shows_nothing(tiny_model):
    with pytest.raises(UserError, match="shows nothing"):
        check_clients.main(["--base", str(tiny_model("llama")), "--model", str(tiny_model("llama"))])


def test_another_answer_and_a_failure_are_said():
    def fails(_subject, _scratch):
        raise RuntimeError("no | luck\nat all")

    subject = check_clients.Subject("base", model="model")
    assert check_clients._outcome(lambda *_: "yes", subject, "no") == "another answer: 'yes', not 'no'"
    assert check_clients._outcome(fails, subject, "no") == "failed: RuntimeError: no \\| luck"
    assert check_clients._outcome(None, subject, "no") == ""
