"""What may be pushed to the hub, what is uploaded of it, and what is said when that fails."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import task_vector
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation import push
from harmful_unlearn.negation.negate import negate, negate_adapter
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.training.flags import TrainingSettings
from tests.helpers.models.tiny_pairs import IDS, record
from tests.helpers.servers import hub

NAME = "someone/unlearned"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------- what is uploaded


def test_every_byte_of_a_model_arrives_and_nothing_else(models, server, capsys):
    folder = models / "unlearned"
    before = contents(folder)
    for name in ("pytorch_model.bin", "task_vector.safetensors", "optimizer.pt", "notes.txt", ".env", "code.py"):
        (folder / name).write_bytes(b"not for others")
    task_vector.main(["--output", str(folder), "--push_to_hub", NAME])
    assert f"pushed: {server.address}/{NAME} (private)" in capsys.readouterr().out
    repository = server.repositories[NAME]
    assert repository.private and repository.files.keys() == before.keys()
    assert sum(name.endswith(".safetensors") for name in before) > 1 and "LICENSE" in before
    changed = {name for name, content in before.items() if repository.files[name] != content}
    assert changed == {"README.md", "run.json"}
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_no_path_and_no_command_line_leaves_the_machine(models, server, tmp_path_factory, monkeypatch):
    """Nor does the folder of a model inside a saved vector."""
    monkeypatch.setattr("sys.argv", ["task_vector.py", "--secret", "hunter2"])
    config = json.loads((models / "base" / "config.json").read_text())
    (models / "base" / "config.json").write_text(json.dumps({**config, "_name_or_path": str(models / "base")}))
    negate(models / "base", [(models / "harmful", 1.0)], None, save_vector=models / "vector")
    negate(models / "base", [(models / "vector", 1.0)], models / "unlearned", overwrite=True)
    push.push(models / "unlearned", NAME)
    files = server.repositories[NAME].files
    for name, content in files.items():
        assert str(tmp_path_factory.getbasetemp()).encode() not in content and b"hunter2" not in content, name
    assert json.loads(files["config.json"]) == {**config, "_name_or_path": None}
    record = json.loads(files["run.json"])
    assert not {"command", "folder"} & record.keys()
    assert record["base"]["name"] == ".../base" and record["title"] == ".../base, unlearned"
    assert record["finetuned"] == record["stage_1"]["finetuned"] == {"model_1": 1.0}
    assert record["stage_1"]["stage_1"]["flags"] == {
        "method": "sku",
        "model_save_dir": ".../harmful",
        "system_prompt": "/no_think",
    }
    (models / "pulled").mkdir()
    (models / "pulled" / "run.json").write_bytes(files["run.json"])
    assert RunRecord.read(models / "pulled").trainings[0].method == "sku"
    assert not ModelCard(files["README.md"].decode()).data.base_model


def test_a_path_is_told_by_its_flag(models, server):
    """Not by its start: data/harmful.jsonl might be OWNER/NAME. What is from the hub has a revision."""
    flags = {"method": "sku", "model_save_dir": "h", "log_file": "lg/run.log", "resume": "auto", "lora": "auto"}
    flags |= {"model_name": "owner/name", "harmful_dataset": "data/harmful.jsonl", "normal_dataset": "owner/texts"}
    record(
        models / "harmful",
        flags=flags | {"more_normal_dataset": "data/tasks", "system_prompt": "h"},
        base={"name": "owner/name", "revision": "0f" * 20},
        harmful_data={"name": "data/harmful.jsonl", "revision": None, "sha256": "0f"},
        normal_data={"name": "owner/texts", "revision": "0f" * 20, "more": {"name": "data/tasks", "revision": None}},
    )
    negate(models / "base", [(models / "harmful", 1.0)], models / "new", base_name="models/base")
    push.push(models / "new", NAME)
    files = server.repositories[NAME].files
    written = json.loads(files["run.json"])
    assert written["base"]["name"] == ".../base" and written["title"] == ".../base, unlearned"
    trained = written["stage_1"]
    assert trained["base"]["name"] == trained["flags"]["model_name"] == "owner/name"
    assert trained["harmful_data"]["name"] == trained["flags"]["harmful_dataset"] == ".../harmful.jsonl"
    assert trained["normal_data"]["name"] == trained["flags"]["normal_dataset"] == "owner/texts"
    assert trained["normal_data"]["more"]["name"] == trained["flags"]["more_normal_dataset"] == ".../tasks"
    kept = {"method": "sku", "resume": "auto", "lora": "auto", "system_prompt": "h"}
    assert kept.items() <= trained["flags"].items()
    assert (trained["flags"]["model_save_dir"], trained["flags"]["log_file"]) == (".../h", ".../run.log")
    for text in (b"data/", b"lg/", b"models/base"):
        assert text not in files["README.md"] + files["run.json"], text


def test_every_flag_that_may_be_a_path_is_known():
    paths = {field.name for field in fields(TrainingSettings) if "Path" in str(field.type)}
    texts = {field.name for field in fields(TrainingSettings) if re.search("hub id", field.metadata["help"])}
    assert paths == push.PATHS
    assert {"model_name", "harmful_dataset", "normal_dataset"} < push.SOURCES
    assert texts - {"harmful_revision", "harmful_split"} <= push.SOURCES


@pytest.mark.parametrize("name, named", [("facebook/opt-1.3b", "facebook/opt-1.3b"), (None, None)])
def test_an_adapters_base_is_a_hub_id_or_not_named(name, named, adapters, server, tmp_path_factory):
    if name:
        made, snapshot = [(adapters / "harmful", 1.0)], adapters / "snapshots" / ("0f" * 20)  # as in the hub's cache
        shutil.copytree(adapters / "base", snapshot)
        negate_adapter(snapshot, made, adapters / "unlearned", base_name=name, overwrite=True)
    push.push(adapters / "unlearned", NAME)
    files = server.repositories[NAME].files
    weights = (adapters / "unlearned" / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == weights
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == named
    card = ModelCard(files["README.md"].decode()).data
    assert card.library_name == "peft" and card.base_model == named and card.tags == ["machine-unlearning", "sku"]
    assert not any(str(tmp_path_factory.getbasetemp()).encode() in content for content in files.values())


def test_what_was_uploaded_loads(adapters, server):
    push.push(adapters / "unlearned", NAME)
    pulled = adapters / "pulled"
    pulled.mkdir()
    for name, content in server.repositories[NAME].files.items():
        (pulled / name).write_bytes(content)
    negate(adapters / "base", [(adapters / "harmful", 1.0)], adapters / "model")
    model = AutoModelForCausalLM.from_pretrained(adapters / "model")(IDS).logits
    ours = AutoPeftModelForCausalLM.from_pretrained(adapters / "unlearned").eval()(IDS).logits
    torch.testing.assert_close(ours, model, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(adapters / "base")
    base.load_adapter(pulled)
    torch.testing.assert_close(base.eval()(IDS).logits, model, rtol=0, atol=1e-5)


def test_one_command_makes_and_pushes(models, server):
    made = ["--base", str(models / "base"), "--finetuned", str(models / "harmful"), "--output", str(models / "new")]
    task_vector.main([*made, "--scaling_coef", "0.5", "--push_to_hub", NAME, "--public"])
    repository = server.repositories[NAME]
    assert not repository.private
    shard = next(name for name in repository.files if name.endswith(".safetensors"))
    assert repository.files[shard] == (models / "new" / shard).read_bytes()
    # Once more with other weights: the repository has the new ones.
    task_vector.main([*made, "--overwrite", "--push_to_hub", NAME, "--public"])
    assert repository.files[shard] == (models / "new" / shard).read_bytes()


# --------------------------------------------------------------------------------------- what can go wrong


def test_access_is_checked_first(models, server, monkeypatch):
    for name in ("unlearned", "a/b/c", "someone/..", "someone/a b"):
        with pytest.raises(UserError, match="give OWNER/NAME"):
            push.push(models / "unlearned", name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: unset it"):
        push.push(models / "unlearned", NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(models / "none"))
    made = ["--base", "no/such", "--finetuned", "no/such", "--output", str(models / "new"), "--push_to_hub", NAME]
    with pytest.raises(UserError, match="`hf auth login`, or set HF_TOKEN"):
        task_vector.main(made)
    assert not server.requests


@pytest.mark.parametrize(
    "where, status, fix",
    [
        ("/api/models", 401, "set HF_TOKEN or run `hf auth login`"),
        ("/create", 403, "write access"),
        ("/create", 409, "give another name"),
        ("/commit", 409, "in the meantime"),
        ("/lfs/", 403, "write access"),
        ("/api/models", 500, "try again later"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_fix(where, status, fix, models, server):
    server.fails[where] = status
    with pytest.raises(UserError, match=fix) as error:
        push.push(models / "unlearned", NAME)
    again = f"`python task_vector.py --push_to_hub {NAME} --output {models / 'unlearned'}` pushes"
    assert str(status) in str(error.value) and again in str(error.value)
    assert hub.TOKEN not in str(error.value)
    assert NAME not in server.repositories or not server.repositories[NAME].files


def test_no_connection(models, server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="was not reached .*check the connection"):
        push.push(models / "unlearned", NAME)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--push_to_hub a/b", "give --output"),
        ("--push_to_hub a/b --output o --adapter_output p", "pushes one folder"),
        ("--push_to_hub a/b --base b --finetuned f --output o --scaling_coef 1 2", "pushes one folder"),
        ("--push_to_hub a/b --base b --finetuned f --save_vector v", "pushes one folder"),
        ("--push_to_hub a/b --output o --finetuned f", "give --base"),
        ("--output o --finetuned f", "give --base"),
        ("--output o --base b --finetuned f --public", "give --push_to_hub"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        task_vector.main(flags.split())
    assert message in capsys.readouterr().err
