"""Models that are wrong, and the hub: one line that names the fix, exit code 2, and nothing written."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from tests.helpers.inputs.bad_files import (
    changed,
    cut,
    entry,
    fill,
    indexed,
    with_config,
    with_entries,
    with_header,
    without_a_layer,
    without_rank,
)
from tests.helpers.inputs.bad_input import TO, Bad, run_good

HUB = "harmful_unlearn.models.hub.snapshot_download"
FC1 = "model.decoder.layers.0.fc1.weight"
NORM = "model.decoder.final_layer_norm.weight"
BASE, TUNED = "--model_name {here}/bad --check", "--finetuned {here}/bad --output {out}/model"


def hub_error(kind: type[Exception]) -> Exception:
    return kind("403", response=SimpleNamespace(headers={}, request=None))


TABLE = {
    # --- models ------------------------------------------------------------------------------------
    "an empty folder": Bad("unlearn", "--model_name {here}", "save_pretrained"),
    "no config.json": Bad("unlearn", BASE, "save_pretrained", changed("base", config__json=None)),
    "config.json is garbage": Bad("unlearn", BASE, "save_pretrained", changed("base", config__json="{")),
    "config.json is a list": Bad("unlearn", BASE, "save_pretrained", changed("base", config__json="[]")),
    "config.json is a folder": Bad("vector", "--base {here}/bad " + TO, "config.json", lambda at: (
        changed("base", config__json=None)(at), (at.here / "bad" / "config.json").mkdir())),
    "an unknown architecture": Bad("unlearn", BASE, "save_pretrained", with_config(model_type="none")),
    "no language model": Bad("unlearn", BASE, "causal language model", changed("base", config__json={
        "model_type": "vit"})),
    "a model with code of its own": Bad("unlearn", BASE, "save_pretrained", with_config(
        model_type="own", auto_map={"AutoConfig": "own.Config"})),
    "heads that do not divide": Bad("unlearn", BASE, "config.json", with_config(num_attention_heads=5)),
    "more layers than memory": Bad("unlearn", BASE, "more than any model has", with_config(num_hidden_layers=10**9)),
    "fewer layers than the weights": Bad("unlearn", BASE, "would be cut off", with_config(num_hidden_layers=1)),
    "fewer layers, to be measured": Bad("evaluate", "--base {here}/bad", "would be cut off",
                                        with_config(num_hidden_layers=1)),
    "no layers": Bad("unlearn", BASE, "num_hidden_layers is 0", with_config(num_hidden_layers=0)),
    "minus one layer": Bad("unlearn", BASE, "num_hidden_layers is -1", with_config(num_hidden_layers=-1)),
    "more experts than memory": Bad("unlearn", BASE, "more than any model has", with_config(
        text_config={"num_experts": 10**6})),
    "a size that is a word": Bad("unlearn", BASE, "config.json", with_config(hidden_size="wide")),
    "a quantized base": Bad("unlearn", BASE, "full-precision", with_config(quantization_config={
        "quant_method": "gptq", "bits": 4})),
    "no tokenizer": Bad("unlearn", BASE, "copy", changed("base", tokenizer__json=None, tokenizer_config__json=None)),
    "a broken tokenizer": Bad("unlearn", BASE, "copy", changed("base", tokenizer__json="{")),
    "another model's tokenizer": Bad("unlearn", BASE, "trained with", with_config(vocab_size=300)),
    "pickled weights alone": Bad("vector", "--base {here}/bad " + TO, "save_pretrained", changed(
        "base", model__safetensors=None, pytorch_model__bin=b"\x80\x04.")),
    "pickled stage 1 weights": Bad("unlearn", "--saved_model {here}/bad", "convert", changed(
        "tuned", model__safetensors=None, pytorch_model__bin=b"\x80\x04.")),
    "a pickled adapter": Bad("vector", TUNED, "convert", changed(
        "adapter", adapter_model__safetensors=None, adapter_model__bin=b"\x80\x04.")),
    "weights cut off": Bad("unlearn", BASE, "copy or download", cut("base", 0.5)),
    "weights cut off in the header": Bad("vector", TUNED, "copy or download", cut("tuned", 0.001)),
    "weights cut off, to be shown": Bad("answers", "--base {here}/bad --unlearned {tuned}", "copy or download",
                                        cut("base", 0.5)),
    "weights cut off, to be measured": Bad("evaluate", "--base {here}/bad", "copy or download", cut("base", 0.5)),
    "weights of no bytes": Bad("vector", TUNED, "copy or download", changed("tuned", model__safetensors=b"")),
    "a header longer than the file": Bad("vector", TUNED, "copy or download", with_header("{}", 2**20)),
    "a header longer than all memory": Bad("vector", TUNED, "copy or download", with_header("{}", 2**63)),
    "a header that is garbage": Bad("vector", TUNED, "copy or download", with_header("{]")),
    "a header that is no text": Bad("vector", TUNED, "copy or download", changed(
        "tuned", model__safetensors=(8).to_bytes(8, "little") + b"\xff" * 8)),
    "offsets that overlap": Bad("vector", TUNED, "copy or download", with_header(
        {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, data=bytes(6))),
    "offsets out of range": Bad("vector", TUNED, "copy or download", with_header({"a": entry("F32", [9], 0, 36)})),
    "offsets turned": Bad("vector", TUNED, "copy or download", with_header({"a": entry("F32", [1], 8, 4)})),
    "a shape that is not the data's": Bad("vector", TUNED, "copy or download",
                                          with_header({"a": entry("F32", [3], 0, 8)})),
    "a shape beyond all numbers": Bad("vector", TUNED, "copy or download",
                                      with_header({"a": entry("F32", [2**40, 2**40], 0, 8)})),
    "no such dtype": Bad("vector", TUNED, "copy or download", with_header({"a": entry("F31", [2], 0, 8)})),
    "a dtype that is not computed in": Bad("vector", TUNED, "not quantized",
                                           with_header({"a": entry("F8_E4M3", [8], 0, 8)})),
    "an entry twice": Bad("vector", TUNED, "copy or download", with_header(
        '{"a": %s, "a": %s}' % (2 * (json.dumps(entry("F32", [2], 0, 8)),)))),
    "a missing shard": Bad("vector", "--base {here}/bad " + TO, "copy or download",
                           indexed({FC1: "model-00001-of-00001.safetensors"})),
    "a dangling shard": Bad("vector", "--base {here}/bad " + TO, "copy or download", lambda at: (
        indexed({FC1: "a.safetensors"})(at), (at.here / "bad" / "a.safetensors").symlink_to("blob"))),
    "a shard that is a device": Bad("vector", "--base {here}/bad " + TO, "copy or download", lambda at: (
        indexed({FC1: "a.safetensors"})(at), (at.here / "bad" / "a.safetensors").symlink_to("/dev/zero"))),
    "an entry that its shard lacks": Bad("vector", "--base {here}/bad " + TO, "copy the model folder", lambda at: (
        indexed({"none": "a.safetensors"})(at),
        shutil.copy(at.base / "model.safetensors", at.here / "bad" / "a.safetensors"))),
    "an index that is garbage": Bad("vector", "--base {here}/bad " + TO, "copy or download", changed(
        "base", model__safetensors=None, model__safetensors__index__json="{")),
    "an index of nothing": Bad("vector", "--base {here}/bad " + TO, "copy or download", indexed([])),
    "an index that leads out": Bad("vector", "--base {here}/bad " + TO, "beside it",
                                   indexed({FC1: "../other.safetensors"})),
    "an index of absolute paths": Bad("vector", "--base {here}/bad " + TO, "beside it",
                                      indexed({FC1: "/etc/other.safetensors"})),
    "an index that leads out, to be trained": Bad("unlearn", BASE, "beside it", lambda at: (
        indexed({FC1: "../other.safetensors"})(at), (at.here / "bad" / "x.safetensors").write_bytes(b""))),
    "an index that leads out, to be shown": Bad("answers", "--base {here}/bad --unlearned {tuned}", "beside it",
        lambda at: (indexed({FC1: "../other.safetensors"})(at),
                    (at.here / "bad" / "x.safetensors").write_bytes(b""))),
    "an index of no safetensors": Bad("vector", "--base {here}/bad " + TO, "beside it", indexed({FC1: "a.bin"})),
    "another shape": Bad("vector", TUNED, "made from this very base", with_entries(
        "tuned", lambda entries: entries.update({FC1: torch.zeros(2, 2)}))),
    "a base of another shape": Bad("unlearn", "--model_name {here}/bad", "copy or download", with_entries(
        "base", lambda entries: entries.update({FC1: torch.zeros(2, 2)}))),
    "an entry too few": Bad("unlearn", "--stage negate --saved_model {here}/bad", "made from this very base",
                            with_entries("tuned", lambda entries: entries.pop(FC1))),
    "an entry too many": Bad("vector", TUNED, "made from this very base", with_entries(
        "tuned", lambda entries: entries.update(extra=torch.zeros(2)))),
    "a base with an entry too few": Bad("unlearn", "--model_name {here}/bad", "complete model folder",
                                        with_entries("base", lambda entries: entries.pop(FC1))),
    "a NaN in the base": Bad("unlearn", "--model_name {here}/bad", "NaN", with_entries("base", fill(FC1, torch.nan))),
    "a NaN that no text reaches": Bad("unlearn", "--model_name {here}/bad", "NaN", with_entries(
        "base", fill("model.decoder.embed_tokens.weight", torch.nan))),
    "an infinite weight, to be shown": Bad("answers", "--base {here}/bad --unlearned {tuned}", "NaN",
                                           with_entries("base", fill(NORM, torch.inf))),
    "a NaN, to be measured": Bad("evaluate", "--base {here}/bad", "NaN", with_entries("base", fill(FC1, torch.nan))),
    "a NaN in the stage 1 model": Bad("vector", TUNED, "check both models",
                                      with_entries("tuned", fill(FC1, torch.nan))),
    "infinity in the stage 1 model": Bad("answers", "--harmful_model {here}/bad", "check both models",
                                         with_entries("tuned", fill(NORM, -torch.inf))),
    "a NaN in the base of a negation": Bad("vector", "--base {here}/bad " + TO, "check both models",
                                           with_entries("base", fill(FC1, torch.nan))),
    "a scale beyond all numbers": Bad("vector", TO + " --scaling_coef 1e300", "lower --scaling_coef"),
    "an adapter of another model": Bad("answers", "--base {here}/bad --unlearned {adapter}", "made from this very base",
                                    without_a_layer),
    "an adapter of rank 0": Bad("vector", TUNED, "merge", without_rank),
    "an adapter for a model": Bad("evaluate", "--model a={adapter} --trained_as {tuned}", "task_vector.py"),
    "an adapter's settings are a list": Bad("vector", TUNED, "copy or download",
                                            changed("adapter", adapter_config__json="[]")),
    "an adapter's alpha is a word": Bad("vector", TUNED, "lora_alpha", lambda at: changed(
        "adapter", adapter_config__json={**json.loads((at.adapter / "adapter_config.json").read_text()),
                                         "lora_alpha": "big"})(at)),
    "run.json is garbage": Bad("evaluate", "--model bad={here}/bad", "copy or download", changed(
        "tuned", run__json="{")),
    "run.json of something else": Bad("evaluate", "--model bad={here}/bad", "unlearn_harm_new.py", changed(
        "tuned", run__json={"flags": {"lr": 1}, "training": {}})),
    "run.json has lists": Bad("vector", TUNED, "run.json", changed("tuned", run__json={"finetuned": [1]})),
    "run.json has words": Bad("vector", TUNED, "run.json", changed("tuned", run__json={"finetuned": {"a": "b"}})),
    "run.json has a list of flags": Bad("unlearn", "--saved_model {here}/bad", "run.json", changed(
        "tuned", run__json={"flags": ["--lr"]})),
    "run.json has a list in a stage": Bad("evaluate", "--model bad={here}/bad", "run.json", changed(
        "tuned", run__json={"stage_1": {"stage_1_of_model_1": []}})),
    "trained by another method": Bad("unlearn", "--saved_model {here}/bad", "--method ga", changed(
        "tuned", run__json={"flags": {"method": "ga"}})),
    # --- the hub -----------------------------------------------------------------------------------
    "no HF_TOKEN": Bad("unlearn", "--model_name owner/gated", "HF_TOKEN", stub=(HUB, hub_error(GatedRepoError))),
    "no HF_TOKEN, elsewhere": Bad("vector", "--base owner/gated " + TO, "HF_TOKEN",
                                  stub=(HUB, hub_error(GatedRepoError))),
    "no HF_TOKEN for data": Bad("unlearn", "--harmful_dataset owner/gated", "HF_TOKEN", stub=(
        "datasets.load_dataset", DatasetNotFoundError("Dataset 'owner/gated' is a gated dataset on the Hub."))),
    "no connection to data": Bad("unlearn", "--harmful_dataset owner/data", "HF_HUB_OFFLINE",
                                 stub=("datasets.load_dataset", ConnectionError("no route"))),
    "offline": Bad("evaluate", "--base owner/model", "HF_HUB_OFFLINE", stub=(HUB, LocalEntryNotFoundError("offline"))),
    "no connection": Bad("answers", "--base owner/model", "go online", stub=(HUB, ConnectionError("no route"))),
    "no such data on the hub": Bad("unlearn", "--harmful_dataset owner/none", "check"),
    "no name of the hub": Bad("reproduce", "--model_name what:is/this", "check the name"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name, is_refused):
    is_refused(TABLE[name])


@pytest.mark.parametrize("name", ["a NaN in the stage 1 model"])
def test_bad_input_to_a_script(name, is_refused_as_a_script):
    """A few of the same, as processes of their own."""
    is_refused_as_a_script(TABLE[name])


def test_links_of_the_hubs_cache_are_followed(models, tmp_path):
    """A snapshot is a folder of links to ../../blobs: what leads out of a folder is refused only in an index."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / ("a" * 40)
    shutil.copytree(models.base, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    at = SimpleNamespace(**{**vars(models), "base": snapshot}, out=tmp_path / "out")
    assert run_good("vector", TO, at) == 0
    assert not any(file.is_symlink() for file in (tmp_path / "out" / "model").iterdir())
