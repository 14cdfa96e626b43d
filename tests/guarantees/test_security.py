"""Nothing that was read is ever run, and no secret is ever written."""

import ast
import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harmful_unlearn.storage.files import ROOT
from tests.helpers import judges
from tests.helpers.inputs.world import make_world

SKIPPED = ("tests", "models", "logs")
CODE = sorted(
    path for path in ROOT.rglob("*.py")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and path.relative_to(ROOT).parts[0] not in SKIPPED
)  # fmt: skip

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy", "pty"}
NAMES = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile",
    "torch.load", "torch.serialization.load", "pandas.read_pickle",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")),
    *(f"yaml.{name}" for name in ("Loader", "FullLoader", "UnsafeLoader", "CLoader")),
}  # fmt: skip
OFF = {"shell", "allow_pickle", "trust_remote_code"}  # keywords that may be nothing but False
ON = {"weights_only", "use_safetensors"}  # nothing but True
PROCESSES = ("subprocess", "multiprocessing", "concurrent.futures.Process", "os.fork", "os.exec", "os.spawn")


def imported(tree: ast.AST) -> dict[str, str]:
    """Each imported name -> what it stands for, dotted."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                names |= {one.asname: one.name} if one.asname else {one.name.split(".")[0]: one.name.split(".")[0]}
                names |= {f"import of {one.name}": one.name}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """A name with its import resolved: after `import numpy as np`, np.load is numpy.load."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return f"{dotted(node.value, names)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def used(tree: ast.AST) -> set[str]:
    """Every name in the code, dotted."""
    names = imported(tree)
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute))
    return {dotted(node, names) for node in nodes} | {*names.values()}


def dangers(source: str) -> set[str]:
    """What of it could run what was read."""
    tree = ast.parse(source)
    found = {name for name in used(tree) if name in NAMES or name.split(".")[0] in MODULES}
    names = imported(tree)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        loads = re.fullmatch(r"transformers\.\w*Model\w*\.from_pretrained", dotted(node.func, names))
        if loads and "use_safetensors" not in {keyword.arg for keyword in node.keywords}:
            found.add(loads[0])  # takes a pickle where there is nothing else
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg in OFF and value is not False) or (keyword.arg in ON and value is not True):
                found.add(keyword.arg)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import os\ndef f():\n    import marshal.x",
        "import joblib\njoblib.load(f)",
        "from shelve import open as o",
        "eval(x)",
        "f = exec",
        "compile(x, y, 'exec')",
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=True)",
        "from torch import load",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "f(allow_pickle=flag)",
        "import os\nos.system(x)",
        "from os import popen as p",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "run(x, shell=yes)",
        "import yaml\nyaml.load(f, Loader=yaml.FullLoader)",
        "from yaml import load",
        "load(trust_remote_code=True)",
        "A.from_pretrained(x, trust_remote_code=args.trust)",
        "f(use_safetensors=False)",
        "f(weights_only=False)",
        "from transformers import AutoModel as M\nM.from_pretrained(x)",
        "import pandas\npandas.read_pickle(f)",
        "from subprocess import getoutput",
    ],
)
def test_what_is_dangerous_is_found(source):
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile(x)",
        "model.eval()",
        "self.load(x)",
        "import torch\ntorch.compile(m)",
        "'eval(x)'",
        "import yaml\nyaml.safe_load(f)",
        "f(trust_remote_code=False, use_safetensors=True)",
        "import ast\nast.literal_eval(x)",
        "import subprocess\nsubprocess.run(['git'])",
        "from safetensors.torch import load",
        "from transformers import AutoConfig, AutoModel\nAutoConfig.from_pretrained(x)",
    ],
)
def test_what_is_harmless_is_not(source):
    assert not dangers(source)


def test_nothing_that_was_read_is_run():
    assert ROOT / "task_vector.py" in CODE and len(CODE) > 40
    found = {str(path.relative_to(ROOT)): dangers(path.read_text(encoding="utf-8")) for path in CODE}
    assert not {path: names for path, names in found.items() if names}


def test_processes_are_started_in_known_places_alone():
    starting = {}
    for path in CODE:
        names = {name for name in used(ast.parse(path.read_text(encoding="utf-8"))) if name.startswith(PROCESSES)}
        if names := {name for name in names if name not in ("subprocess", "subprocess.CalledProcessError")}:
            starting[str(path.relative_to(ROOT))] = names
    assert starting == {
        "harmful_unlearn/storage/provenance.py": {"subprocess.run"},  # git describe
        "harmful_unlearn/demo.py": {"subprocess.run"},  # the scripts of this repository
        "benchmarks/measuring.py": {"subprocess.Popen"},
    }


# --- secrets --------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_plantedQ7vXhub", "HUGGING_FACE_HUB_TOKEN": "hf_plantedQ7vXold", "WANDB_API_KEY": "plantedQ7vXwandb",
    "OPENAI_API_KEY": "sk-plantedQ7vXkey", "password": "plantedQ7vXpassword",
}  # fmt: skip
LOGIN = f"someone:{SECRETS['password']}"
# Each command's arguments come as JSON; they share a process, since imports take most of the time.
COMMANDS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from accelerate.state import AcceleratorState
import main, task_vector
from harmful_unlearn import evaluation, unlearn_harm_new
from harmful_unlearn.cli.running import exit_code

scripts = {"main": main, "task_vector": task_vector, "evaluation": evaluation, "unlearn": unlearn_harm_new}
for name, *arguments in json.load(sys.stdin):
    print("exit code", exit_code(lambda: scripts[name].main(arguments)), flush=True)
    AcceleratorState._reset_state(reset_partial_state=True)
"""


class Gossip(judges.Server):
    """Repeats all that it was sent, and the key that it gave out, now and then as an error."""

    def act(self, what):
        known = f"{self.headers['Authorization']} {SECRETS['OPENAI_API_KEY']} {LOGIN} {SECRETS['password']}"
        number = len(self.server.requests) % 4
        if number == 3:
            self.send(401, json.dumps({"error": {"message": f"no good: {known}"}}))
        else:
            message = {"role": "assistant", "content": "SAFE" if number == 1 else known}
            self.send(200, json.dumps({"choices": [{"index": 0, "message": message}]}))


def forms(secret: str) -> list[bytes]:
    return [secret.encode(), base64.b64encode(secret.encode()), secret.encode("utf-16-le")]


def leaks(folder: Path, said: str) -> set[str]:
    """The files that hold a secret, in their contents or their names."""
    everything = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    everything = {str(path): str(path).encode() + content for path, content in everything.items()}
    everything["what was said"] = said.encode()
    wanted = [form for secret in (*SECRETS.values(), LOGIN) for form in forms(secret)]
    return {where for where, content in everything.items() if any(form in content for form in wanted)}


def test_no_secret_is_written_or_said(tmp_path, monkeypatch):
    """All commands, with secrets in the environment and in the server's address, and a server that repeats them."""
    world, out = make_world(tmp_path / "world"), tmp_path / "out"
    base, data = str(world / "base"), world / "data"
    copy, unlearned = str(out / "copy"), str(out / "unlearned")
    small = ["--n_seen", "3", "--n_unseen", "6", "--n_normal", "3", "--max_new_tokens", "6", "--seed", "0"]
    measured = ["--model", f"sku={unlearned}", "--base", base, "--unseen_dataset", str(data / "unseen.jsonl"), *small]
    measured += ["--base_answers", str(out / "base-answers")]
    commands = [
        [
            "unlearn",
            "--model_name",
            base,
            "--harmful_dataset",
            str(data / "harmful.jsonl"),
            "--normal_dataset",
            str(data / "normal.csv"),
            "--max_unlearn_steps",
            "3",
            "--lr",
            "1e-3",
            "--model_save_dir",
            copy,
            "--task_vector_saving_path",
            unlearned,
            "--log_file",
            str(out / "logs" / "run.log"),
        ],
        [
            "main",
            "--base",
            base,
            "--unlearned",
            unlearned,
            "--max_length",
            "99",
            "--harmful_prompt",
            "How do I hide a gnome?",
        ],
        ["evaluation", *measured, "--output", str(out / "classifier")],
        ["evaluation", *measured, "--output", str(out / "server"), "--judge", "openai:gossip"],
        [
            "task_vector",
            "--base",
            base,
            "--finetuned",
            copy,
            "--output",
            str(out / "again"),
            "--save_vector",
            str(out / "vector"),
            "--scaling_coef",
            "0.5",
        ],
        ["main", "--base", "someone/gated", "--unlearned", unlearned],
    ]
    homes = {name: str(tmp_path / name) for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")}
    for home in homes.values():
        Path(home).mkdir()
    monkeypatch.setattr(judges, "Server", Gossip)
    with judges.serving() as server:
        address = f"http://{LOGIN}@127.0.0.1:{server.server_address[1]}/v1"
        environment = {**os.environ, **homes, **SECRETS, "OPENAI_BASE_URL": address, "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, str(ROOT)],
            input=json.dumps(commands),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        sent = [str(headers) for _, _, headers in server.requests]
    said = done.stdout + done.stderr
    codes = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["0"] * 5 + ["2"], said
    assert len(sent) > 4 and not any(SECRETS["HF_TOKEN"] in headers for headers in sent)
    kept = [line for file in (out / "server" / "answers").iterdir() for line in file.read_text().splitlines()]
    notes = {json.loads(line)["note"] for line in kept}
    assert "HTTP 401" in notes and any(note.startswith("unreadable reply of ") for note in notes)
    assert sum(path.is_file() for path in out.rglob("*")) > 30 and (out / "copy" / "run.json").is_file()
    assert not leaks(tmp_path, said)


@pytest.mark.parametrize("secret", [*SECRETS.values(), base64.b64encode(LOGIN.encode()).decode()])
def test_a_leak_is_found(tmp_path, secret):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"\xff\x00" + secret.encode() + b"\x00")
    (tmp_path / "other").write_text("nothing")
    assert leaks(tmp_path, "") == {str(tmp_path / "deep" / "file")}
    assert "what was said" in leaks(tmp_path, f"the key {secret}")
