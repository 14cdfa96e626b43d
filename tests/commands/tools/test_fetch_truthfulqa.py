"""`make data`: a good file or none, whatever the server sends."""

import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dataloader import fetch_truthfulqa
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.storage.files import ROOT
from tests.helpers.inputs.tables import TRUTHFUL


@pytest.fixture(scope="module")
def server():
    """A local stand-in for the download: good, 404, garbage, truncated, stalled, ... by path."""
    good = TRUTHFUL.read_bytes()
    released = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            kind = self.path.strip("/")
            if kind == "404":
                return self.send_error(404)
            body = {
                "garbage": bytes(range(256)) * 9,
                "html": b"<html>\n<p>Sign in, please</p>\n</html>\n",
                "empty": b"",
                "columns": b"Question,Answer\nq,a\n",
                "huge": b"x" * 3000,
            }.get(kind, good)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if kind in ("truncated", "stalled"):
                # Cut after a complete row: what is left would pass for a good file.
                body = body[: body.rindex(b"\n", 0, -1) + 1]
            self.wfile.write(body)
            if kind == "stalled":
                self.wfile.flush()
                released.wait(20)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command on a folder of its own: (exit code, stderr)."""
    monkeypatch.setattr(fetch_truthfulqa, "HERE", tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["fetch_truthfulqa.py", "--timeout", "0.5", *flags])
        return exit_code(fetch_truthfulqa.main), capsys.readouterr().err

    return run


def test_fetch(run, server, tmp_path):
    assert run("--url", f"{server}/good") == (0, "")
    assert (tmp_path / "TruthfulQA.csv").read_bytes() == TRUTHFUL.read_bytes()
    assert os.listdir(tmp_path) == ["TruthfulQA.csv"]
    # A good file is kept without asking the server; a broken one is replaced.
    assert run("--url", f"{server}/404") == (0, "")
    (tmp_path / "TruthfulQA.csv").write_text("no,thing\n")
    assert run("--url", f"{server}/good") == (0, "")
    assert (tmp_path / "TruthfulQA.csv").read_bytes() == TRUTHFUL.read_bytes()


@pytest.mark.parametrize(
    "kind, says",
    [
        ("404", "404"),
        ("garbage", "did not send TruthfulQA.csv"),
        ("html", "did not send TruthfulQA.csv"),
        ("empty", "did not send TruthfulQA.csv"),
        ("columns", "did not send TruthfulQA.csv"),
        ("truncated", "bytes"),
        ("stalled", "timed out"),
        ("huge", "more than"),
    ],
)
@pytest.mark.parametrize("existing", [True, False])
def test_failed_fetch_leaves_all_as_it_was(kind, says, existing, run, server, tmp_path, monkeypatch):
    if existing:
        (tmp_path / "TruthfulQA.csv").write_bytes(TRUTHFUL.read_bytes())
    if kind == "huge":
        monkeypatch.setattr(fetch_truthfulqa, "MAX_BYTES", 2999)
    started = time.monotonic()
    code, error = run("--force", "--url", f"{server}/{kind}")
    assert code == 2 and error.count("\n") == 1 and says in error and f"{server}/{kind}" in error
    assert time.monotonic() - started < 10
    assert os.listdir(tmp_path) == (["TruthfulQA.csv"] if existing else [])
    if existing:
        assert (tmp_path / "TruthfulQA.csv").read_bytes() == TRUTHFUL.read_bytes()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "nonsense", "http://[/x", "file:///no/such"]
)
def test_fetch_from_nowhere(url, run):
    code, error = run("--url", url)
    assert code == 2 and error.count("\n") == 1 and "--url" in error


def test_fetch_into_a_read_only_folder(run, server, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)  # root may write into any folder
    code, error = run("--url", f"{server}/good")
    assert code == 2 and "not writable" in error


def test_fetch_is_a_command_that_runs_from_anywhere(tmp_path):
    script = ROOT / "dataloader" / "fetch_truthfulqa.py"
    done = subprocess.run(
        [sys.executable, str(script), "--force", "--url", "http://127.0.0.1:9/x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "no_proxy": "127.0.0.1"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
