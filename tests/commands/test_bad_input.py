"""Bad input to every command: one line that names the fix, exit code 2, no traceback, and nothing written."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

import main as spot_check
import task_vector
from harmful_unlearn import demo, evaluation, reproduce, unlearn_harm_new
from harmful_unlearn.cli import exit_code
from harmful_unlearn.storage.files import ROOT
from tests.helpers.bad_files import (
    Maker,
    changed,
    cut,
    entry,
    file,
    fill,
    indexed,
    link,
    with_config,
    with_entries,
    with_header,
    without_a_layer,
    without_rank,
)
from tests.helpers.tiny import GOLDENS

spec = importlib.util.spec_from_file_location("fetcher", ROOT / "dataloader" / "fetch_truthfulqa.py")
fetcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fetcher)

MAINS = {
    "unlearn": unlearn_harm_new.main, "vector": task_vector.main, "answers": spot_check.main,
    "evaluate": evaluation.main, "reproduce": reproduce.main, "demo": demo.main, "fetch": fetcher.main,
}  # fmt: skip
SCRIPTS = {
    "unlearn": "harmful_unlearn/unlearn_harm_new.py", "vector": "task_vector.py", "answers": "main.py",
    "evaluate": "harmful_unlearn/evaluation.py", "reproduce": "harmful_unlearn/reproduce.py",
    "demo": "harmful_unlearn/demo.py", "fetch": "dataloader/fetch_truthfulqa.py",
}  # fmt: skip
# Good commands; an entry's words come after them. {base}, {tuned} and {adapter} are models, {here} holds what the
# entry makes, {out} is where the command would write.
DATA = "--harmful_dataset {goldens}/pku_saferlhf_current_schema.jsonl --normal_dataset {goldens}/TruthfulQA.csv "
GOOD = {
    "unlearn": "--model_name {base} --max_unlearn_steps 1 --model_save_dir {out}/harmful --log_file {out}/run.log "
               "--task_vector_saving_path {out}/unlearned " + DATA,
    "vector": "--base {base} ",
    "answers": "--base {base} --unlearned {out}/unlearned --harmful_model {tuned} ",
    "evaluate": "--model m={tuned} --base {base} --output {out} --n_seen 1 --n_unseen 0 --n_normal 0 ",
    "reproduce": "--model_name {base} --recipe demo --output {out} " + DATA,
    "demo": "--quick --output {out} ",
    "fetch": "--url http://127.0.0.1:9/none ",
}  # fmt: skip
TO = "--finetuned {tuned} --output {out}/model"


@dataclass
class Bad:
    """An entry: a command, its last words, a word of the fix, and what it needs made in `here` or stubbed."""

    command: str
    words: str | list[str]
    fix: str
    make: Maker | None = None
    stub: tuple[str, Exception] | None = None
    skip: bool = False


def hub_error(kind: type[Exception]) -> Exception:
    return kind("403", response=SimpleNamespace(headers={}, request=None))


HUB = "harmful_unlearn.models.hub.snapshot_download"
FC1 = "model.decoder.layers.0.fc1.weight"
NORM = "model.decoder.final_layer_norm.weight"
ROW = json.loads((GOLDENS / "pku_saferlhf_current_schema.jsonl").read_text(encoding="utf-8").splitlines()[0])
NORMAL = "Question,Best Answer,Correct Answers\nWhy?,So.,So.; Thus.\n"
HARNESS = importlib.util.find_spec("lm_eval") is not None
NO_PROC = not Path("/proc/self/mem").exists()
ROOT_USER = os.geteuid() == 0  # permission bits do not hold root back
HARMFUL, NORMAL_FLAG = "--harmful_dataset {here}/x.jsonl", "--normal_dataset {here}/x.csv"
BASE, TUNED = "--model_name {here}/bad --check", "--finetuned {here}/bad --output {out}/model"

TABLE = {
    # --- flags ------------------------------------------------------------------------------------
    "an unknown flag": Bad("unlearn", "--no_such_flag", "--help"),
    "a flag misspelt": Bad("unlearn", "--batch-size 2", "did you mean --batch_size?"),
    "a required flag misspelt": Bad("evaluate", "--modle x", "did you mean --model?"),
    "a flag abbreviated": Bad("unlearn", "--max_unlearn 3", "--max_unlearn_steps"),
    "a flag abbreviated, elsewhere": Bad("fetch", "--time 3", "--timeout"),
    "one dash": Bad("unlearn", "-lr 1e-3", "--lr"),
    "a stray word": Bad("demo", "quick", "--help"),
    "no value": Bad("unlearn", "--lr", "--help"),
    "no values": Bad("reproduce", "--seeds", "--help"),
    "too few values": Bad("reproduce", "--relearn_lr 1", "--help"),
    "a required flag left out": Bad("vector", "--output {out}/model", "--finetuned"),
    "text for a number": Bad("unlearn", "--lr fast", "a number above 0"),
    "text for a whole number": Bad("unlearn", "--batch_size 2.5", "a whole number from 1"),
    "zero": Bad("unlearn", "--lr 0", "a number above 0"),
    "NaN": Bad("unlearn", "--bad_weight nan", "a finite number"),
    "infinity": Bad("unlearn", "--bad_weight -inf", "a finite number"),
    "a negative rate in exponent form": Bad("unlearn", "--lr -1e-3", "a number above 0"),
    "a negative seed": Bad("answers", "--seed -1", "a whole number from 0"),
    "a seed too large": Bad("unlearn", "--seed 4294967296", "4294967295"),
    "no tokens": Bad("answers", "--max_length 0", "a whole number from 1"),
    "a temperature of 0": Bad("answers", "--temperature 0", "a number above 0"),
    "alpha is NaN": Bad("vector", TO + " --scaling_coef nan", "a finite number"),
    "a coefficient is infinite": Bad("vector", TO + " --coefs inf", "a finite number"),
    "a timeout below 0": Bad("fetch", "--timeout -1", "a number above 0"),
    "no seeds": Bad("demo", "--seeds 0", "from 1"),
    "a share above 1": Bad("demo", "--refusal_share 1.5", "from 0 to 1"),
    "an unknown choice": Bad("unlearn", "--variant both", "paper"),
    "an unknown device map": Bad("unlearn", "--device_map everywhere", "balanced"),
    "an unknown decoding": Bad("evaluate", "--decoding beam", "greedy"),
    "an unknown judge": Bad("evaluate", "--judge oracle", "classifier"),
    "no key for a judge": Bad("evaluate", "--judge openai:x", "OPENAI_API_KEY"),
    "no key for a judge, before any training": Bad("reproduce", "--judge openai:x", "OPENAI_API_KEY"),
    "no such judge model": Bad("reproduce", "--judge hf:{here}/none", "check the path"),
    "no such BLEURT": Bad("evaluate", "--bleurt {here}/none", "check the path"),
    "no harness": Bad("evaluate", "--lm_eval truthfulqa_mc1", "pip install lm_eval", skip=HARNESS),
    "no such GPU": Bad("answers", "--device_map cuda:99", "give auto or cpu"),
    "answers longer than the model": Bad("evaluate", "--max_new_tokens 9999", "--max_new_tokens of at most"),
    "answers longer than the model, shown": Bad("answers", "--max_length 9999", "--max_length of at most"),
    "prompts longer than the answers": Bad("answers", "--max_length 4", "--max_length above"),
    "texts of one token": Bad("unlearn", "--max_length 1", "give a larger one"),
    "a model's name too long for a file": Bad("evaluate", "--model " + 101 * "x" + "={tuned}", "NAME=PATH_OR_ID"),
    "4 bits without an adapter": Bad("unlearn", "--quantize 4bit --lora off", "--lora on"),
    "an unknown recipe": Bad("reproduce", "--recipe gpt", "recipes.py"),
    "an unknown run": Bad("reproduce", "--runs dpo", "task_vector"),
    "an unknown category": Bad("unlearn", ["--harm_category", "No Such Harm"], "take from"),
    "an unknown category, before any training": Bad("reproduce", ["--harm_category", "No Such Harm"], "take from"),
    "scales that reach no end": Bad("reproduce", "--alpha_sweep 0,1,...,inf", "0,0.25,...,2"),
    "a billion scales": Bad("reproduce", "--alpha_sweep 0,1e-9,...,1", "0,0.25,...,2"),
    "an open quote": Bad("reproduce", ["--train_flags", "'"], "--help"),
    "a training flag misspelt": Bad("reproduce", ["--train_flags", "--prescision bf16"], "--precision"),
    "nothing to learn": Bad("unlearn", "--bad_weight 0 --random_weight 0 --normal_weight 0", "weights are all 0"),
    "nothing to measure": Bad("evaluate", "--n_seen 0", "--n_seen"),
    "two of a kind": Bad("vector", TO + " --vector {tuned}", "--finetuned"),
    "nothing to write": Bad("vector", "--finetuned {tuned}", "--output"),
    "a scale twice": Bad("vector", TO + " --scaling_coef 1 1.0", "once"),
    "coefficients without models": Bad("vector", TO + " --coefs 1 2", "one each"),
    "a model's name twice": Bad("evaluate", "--model m={base}", "NAME=PATH_OR_ID"),
    "a stage against a model": Bad("unlearn", "--stage acquire --saved_model {tuned}", "--stage acquire"),
    "a weight the method lacks": Bad("unlearn", "--method ga --normal_weight 1", "leave it out"),
    "LoRA's rank without LoRA": Bad("unlearn", "--lora off --lora_r 4", "--lora on"),
    "an unknown LoRA target": Bad("unlearn", "--lora on --lora_target_modules query", "q_proj"),
    "more answers than there are": Bad("unlearn", "--k_random 99", "at most"),
    "a name that is no text": Bad("vector", [*TO.split()[:-1], "{out}/\udcff"], "UTF-8"),
    "an empty path": Bad("vector", ["--finetuned", "{tuned}", "--output", ""], "empty"),
    "an empty model": Bad("unlearn", ["--model_name", ""], "empty"),
    "an empty data set": Bad("unlearn", ["--harmful_dataset", ""], "empty"),
    "lines in a name": Bad("vector", ["--finetuned", "./a\nb\x1b[31m", "--output", "{out}/m"], "check the path"),
    # --- paths ------------------------------------------------------------------------------------
    "no such folder": Bad("unlearn", "--model_name {here}/none", "check the path"),
    "no such home": Bad("vector", "--finetuned {tuned} --output ~nobody-is-called-so/m", "full path"),
    "no such home of data": Bad("unlearn", "--harmful_dataset ~nobody-is-called-so/x.csv", "full path"),
    "no such adapter": Bad("vector", "--finetuned {here}/none --adapter_output {out}/a", "check the path"),
    "no stage 1 model": Bad("unlearn", "--stage negate", "run stage 1"),
    "no models to show": Bad("answers", "--harmful_model {here}/none", "--harmful_model"),
    "no training to tell of": Bad("evaluate", "--model b={base}", "--trained_as"),
    "no comparison": Bad("demo", "--check_judge {here}", "--output of reproduce.py"),
    "a file for a model": Bad("unlearn", "--model_name {here}/x", "folder or a hub id", file("x", "x")),
    "a folder for data": Bad("unlearn", "--normal_dataset {here}", "check its split and its files"),
    "a file for a target": Bad("unlearn", "--model_save_dir {here}/x", "path of a folder", file("x", "x")),
    "a file for results": Bad("evaluate", "--output {here}/x", "path of a folder", file("x", "x")),
    "a file for a comparison": Bad("reproduce", "--output {here}/x", "path of a folder", file("x", "x")),
    "a file for a demo": Bad("demo", "--output {here}/x", "path of a folder", file("x", "x")),
    "a file for a part of a path": Bad("vector", "--finetuned {tuned} --output {here}/x/y/z", "another path",
                                       file("x", "x")),
    "a folder for the log": Bad("unlearn", "--log_file {here}", "path of a file"),
    "a folder where metrics go": Bad("unlearn", "--log_file {here}/l.log", "path of a file",
                                     lambda at: (at.here / "l.metrics.jsonl").mkdir()),
    "a device for the log": Bad("unlearn", "--log_file /dev/full", "path of a file"),
    "a full target": Bad("vector", "--finetuned {tuned} --output {here}", "--overwrite", file("x", "x")),
    "a target in a device": Bad("vector", "--finetuned {tuned} --output /dev/null/x", "another path"),
    "a target in /proc": Bad("vector", "--finetuned {tuned} --output /proc/x", "another path", skip=NO_PROC),
    "a log in /proc": Bad("unlearn", "--log_file /proc/x/run.log", "another path", skip=NO_PROC),
    "a target in a read-only folder": Bad("unlearn", "--model_save_dir {here}/ro/m", "another path",
                                          lambda at: (at.here / "ro").mkdir(mode=0o555), skip=ROOT_USER),
    "the root folder": Bad("vector", "--finetuned {tuned} --output /", "a folder in it"),
    "where one stands": Bad("vector", "--finetuned {tuned} --output . --overwrite", "a folder in it"),
    "a target inside the base": Bad("vector", "--finetuned {tuned} --output {base}/m", "folder of its own"),
    "a target for two": Bad("vector", TO + " --save_vector {out}/model", "folder of its own"),
    "the log inside a target": Bad("unlearn", "--log_file {out}/harmful/run.log", "elsewhere"),
    "a name too long": Bad("vector", "--finetuned {tuned} --output {out}/" + 245 * "x", "another path"),
    "a model's name too long": Bad("unlearn", "--model_name ./" + 300 * "x", "another path"),
    "a data set's name too long": Bad("unlearn", f"--harmful_dataset ./{300 * 'x'}.csv", "another path"),
    "a loop of links": Bad("vector", "--finetuned {tuned} --output {here}/loop", "symbolic links", link("loop", "loop")),
    "a loop of links for a model": Bad("unlearn", "--model_name {here}/loop", "check the path", link("loop", "loop")),
    "a loop of links for data": Bad("unlearn", HARMFUL, "--harmful_dataset", link("x.jsonl", "x.jsonl")),
    "a loop of links to measure": Bad("evaluate", "--model {here}/loop", "check the path", link("loop", "loop")),
    "a loop of links beside a log": Bad("unlearn", "--stage negate --saved_model {here}/none --model_save_dir {here}/l",
                                        "--saved_model", link("l", "l")),
    "a dangling link for data": Bad("unlearn", HARMFUL, "--harmful_dataset", link("x.jsonl", "none")),
    "a dangling link to nowhere": Bad("vector", "--finetuned {tuned} --output {here}/link", "another path",
                                      link("link", "/dev/null/x")),
    "endless data": Bad("unlearn", HARMFUL, "--harmful_dataset", link("x.jsonl", "/dev/zero")),
    "data that cannot be read": Bad("unlearn", HARMFUL, "--harmful_dataset", link("x.jsonl", "/proc/self/mem"),
                                    skip=NO_PROC),
    "data that may not be read": Bad("unlearn", HARMFUL, "--harmful_dataset",
                                     lambda at: (at.here / "x.jsonl").touch(0o000), skip=ROOT_USER),
    # --- data -------------------------------------------------------------------------------------
    "no data": Bad("unlearn", "--harmful_dataset {here}/none.jsonl", "--harmful_dataset"),
    "data of no known kind": Bad("unlearn", "--harmful_dataset {here}/x.txt", ".jsonl", file("x.txt", "x")),
    "empty data": Bad("unlearn", HARMFUL, "--harmful_dataset", file("x.jsonl", "\n")),
    "a header alone": Bad("unlearn", NORMAL_FLAG, "--normal_dataset", file("x.csv", NORMAL.splitlines()[0])),
    "binary data": Bad("unlearn", HARMFUL, "UTF-8", file("x.jsonl", bytes(range(256)))),
    "a NUL in a cell's place": Bad("unlearn", NORMAL_FLAG, "--normal_dataset", file("x.csv", bytes(99))),
    "UTF-16": Bad("unlearn", NORMAL_FLAG, "save it as UTF-8", file("x.csv", NORMAL.encode("utf-16"))),
    "Latin-1": Bad("unlearn", NORMAL_FLAG, "save it as UTF-8",
                   file("x.csv", NORMAL.replace("So", "Ü").encode("latin1"))),
    "a packed file": Bad("unlearn", NORMAL_FLAG, "save it as UTF-8", file("x.csv", b"\x1f\x8b\x08\0")),
    "a huge cell that never ends": Bad("unlearn", NORMAL_FLAG, "fix it",
                                       file("x.csv", NORMAL + '"' + 2**22 * "x")),
    "more cells than columns": Bad("unlearn", NORMAL_FLAG, "fix it", file("x.csv", NORMAL + "a,b,c,d,e\n")),
    "wrong columns": Bad("unlearn", NORMAL_FLAG, "with them", file("x.csv", "Question,Answer\na,b\n")),
    "broken JSON": Bad("unlearn", HARMFUL, "fix it", file("x.jsonl", '{"prompt": ')),
    "JSON nested too deeply": Bad("unlearn", HARMFUL, "fix it", file("x.jsonl", 99999 * "[")),
    "rows that are no objects": Bad("unlearn", HARMFUL, "fix it", file("x.jsonl", "[1, 2]\n3\n")),
    "a number for a text": Bad("unlearn", HARMFUL, "fix that row", file("x.jsonl", json.dumps({**ROW, "prompt": 1}))),
    "half a character": Bad("unlearn", HARMFUL, "fix that row",
                            file("x.jsonl", json.dumps({**ROW, "prompt": "\ud800"}))),
    "a label that is none": Bad("unlearn", HARMFUL, "fix that row",
                                file("x.jsonl", json.dumps({**ROW, "is_response_0_safe": "perhaps"}))),
    "a label that is a list": Bad("unlearn", HARMFUL, "fix that row",
                                  file("x.jsonl", json.dumps({**ROW, "is_response_0_safe": []}))),
    "a severity beyond all numbers": Bad("unlearn", HARMFUL + " --min_severity 1", "fix that row",
                                         file("x.jsonl", json.dumps({**ROW, "response_0_severity_level": 10**400}))),
    "categories nested too deeply": Bad("unlearn", [*HARMFUL.split(), "--harm_category", "A"], "fix that row",
                                        file("x.jsonl", json.dumps({**ROW, "response_0_harm_category": 99999 * "["}))),
    "nothing unsafe": Bad("unlearn", HARMFUL, "--harmful_dataset",
                          file("x.jsonl", json.dumps({**ROW, "is_response_0_safe": True, "is_response_1_safe": True}))),
    "no whole Parquet file": Bad("unlearn", "--harmful_dataset {here}/x.parquet", "--harmful_dataset",
                                 file("x.parquet", b"PAR1" + bytes(40))),
    "half an address": Bad("fetch", "--url http://[/x", "--url"),
    "a file that is no address": Bad("fetch", "--url file:///no/such", "--url"),
    "an endless timeout": Bad("fetch", "--timeout inf", "a number above 0"),
    "no address": Bad("fetch", "--url nonsense", "--url"),
    "judged answers that are no JSON": Bad("demo", "--check_judge {here}", "remove the file", lambda at: (
        (at.here / "seed-0/evaluation/answers").mkdir(parents=True),
        (at.here / "seed-0/evaluation/answers/base.jsonl").write_text("{\n"))),
    # --- models -----------------------------------------------------------------------------------
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
    # --- the hub ----------------------------------------------------------------------------------
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


@pytest.fixture(scope="module")
def models_made(tiny_model, tmp_path_factory) -> SimpleNamespace:
    """A base, a stage 1 model of it, and an adapter."""
    home = tmp_path_factory.mktemp("models")
    at = SimpleNamespace(base=tiny_model("opt"), tuned=home / "tuned", adapter=home / "adapter", goldens=GOLDENS)
    for folder, more in ((at.tuned, []), (at.adapter, ["--lora", "on", "--lora_r", "2"])):
        words = GOOD["unlearn"].format(**vars(at), out=home).split()
        unlearn_harm_new.main([*words, "--stage", "acquire", "--model_save_dir", str(folder), *more])
    return at


def words_of(bad: Bad, at: SimpleNamespace) -> list[str]:
    words = bad.words.split() if isinstance(bad.words, str) else bad.words
    return [word.format(**vars(at)) for word in [*GOOD[bad.command].split(), *words]]


def listing(*folders: Path) -> set:
    """Everything in these folders: path, size, time of the last change."""
    found = [Path(top) / name for folder in folders for top, _, names in os.walk(folder) for name in names]
    stats = {path: path.lstat() for path in found}
    folders = {Path(top) for folder in folders for top, _, _ in os.walk(folder)}
    return folders | {(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def refused(code: int, said: str, fix: str) -> None:
    errors = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1, said
    assert fix in errors[0], said
    assert said.endswith(errors[0] + "\n"), said
    assert "Traceback" not in said and "usage:" not in said, said


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name, models_made, tmp_path, monkeypatch, capsys):
    bad = TABLE[name]
    if bad.skip:
        pytest.skip("cannot be made here")
    at = SimpleNamespace(**vars(models_made), here=tmp_path / "here", out=tmp_path / "out")
    at.here.mkdir()
    if bad.make:
        bad.make(at)
    monkeypatch.setattr(fetcher, "HERE", at.here)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    if bad.stub:
        where, error = bad.stub

        def refuse(*_, **__):
            raise error

        monkeypatch.setattr(where, refuse)
    watched = [tmp_path, models_made.base, models_made.tuned, ROOT / "logs", ROOT / "models", ROOT / "dataloader"]
    before = listing(*watched)
    words = words_of(bad, at)
    try:
        code = exit_code(lambda: MAINS[bad.command](words))
    except SystemExit as stop:
        code = stop.code
    refused(code, capsys.readouterr().err, bad.fix)
    assert listing(*watched) == before


@pytest.mark.parametrize("name", ["one dash", "a flag abbreviated, elsewhere", "a NaN in the stage 1 model"])
def test_bad_input_to_a_script(name, models_made, tmp_path):
    """A few of the same as processes of their own."""
    bad = TABLE[name]
    at = SimpleNamespace(**vars(models_made), here=tmp_path / "here", out=tmp_path / "out")
    at.here.mkdir()
    if bad.make:
        bad.make(at)
    before = listing(tmp_path)
    script = [sys.executable, ROOT / SCRIPTS[bad.command], *words_of(bad, at)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    refused(done.returncode, done.stderr, bad.fix)
    assert listing(tmp_path) == before


def run(name: str, words: str, at: SimpleNamespace) -> int:
    return exit_code(lambda: MAINS[name](words_of(Bad(name, words, ""), at)))


def test_negative_numbers_may_have_an_exponent(models_made, tmp_path):
    """argparse by itself takes -1e-3 for a flag."""
    at = SimpleNamespace(**vars(models_made), out=tmp_path)
    assert run("vector", "--finetuned {tuned} --coefs -1E+0 --output {out}/model --scaling_coef -1e-3 -.5e1", at) == 0
    scales = {json.loads(file.read_text())["scaling_coef"] for file in tmp_path.glob("model/*/run.json")}
    assert scales == {-1e-3, -5.0}
    assert run("unlearn", "--bad_weight -1e-3 --normal_weight -1.5e+0 --scaling_coef -2e0 --check", at) == 0


def test_links_of_the_hubs_cache_are_followed(models_made, tmp_path):
    """A snapshot is a folder of links to ../../blobs: what leads out of a folder is refused in an index alone."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / ("a" * 40)
    shutil.copytree(models_made.base, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    at = SimpleNamespace(**{**vars(models_made), "base": snapshot}, out=tmp_path / "out")
    assert run("vector", TO, at) == 0
    assert not any(file.is_symlink() for file in (tmp_path / "out" / "model").iterdir())
