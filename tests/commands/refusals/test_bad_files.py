"""Paths and data files that are wrong: one line that names the fix, exit code 2, and nothing written."""

import json
import os
from pathlib import Path

import pytest

from tests.helpers.inputs.bad_files import file, link
from tests.helpers.inputs.bad_input import TO, Bad
from tests.helpers.models.tiny import GOLDENS

ROW = json.loads((GOLDENS / "pku_saferlhf_current_schema.jsonl").read_text(encoding="utf-8").splitlines()[0])
NORMAL = "Question,Best Answer,Correct Answers\nWhy?,So.,So.; Thus.\n"
NO_PROC = not Path("/proc/self/mem").exists()
ROOT_USER = os.geteuid() == 0  # permission bits do not hold root back
HARMFUL, NORMAL_FLAG = "--harmful_dataset {here}/x.jsonl", "--normal_dataset {here}/x.csv"

TABLE = {
    # --- paths -------------------------------------------------------------------------------------
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
    "a loop of links": Bad("vector", "--finetuned {tuned} --output {here}/loop", "symbolic links",
                           link("loop", "loop")),
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
    # --- data --------------------------------------------------------------------------------------
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
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name, is_refused):
    is_refused(TABLE[name])
