"""Models for bad input, and the check that a command refuses it."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from dataloader import fetch_truthfulqa
from harmful_unlearn import unlearn_harm_new
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.storage.files import ROOT
from tests.helpers.inputs.bad_input import GOOD, MAINS, SCRIPTS, Bad, check_refusal, listing, words_of
from tests.helpers.models.tiny import GOLDENS


@pytest.fixture(scope="session")
def models(tiny_model, tmp_path_factory) -> SimpleNamespace:
    """A base, a stage 1 model of it, and an adapter."""
    home = tmp_path_factory.mktemp("models")
    at = SimpleNamespace(base=tiny_model("opt"), tuned=home / "tuned", adapter=home / "adapter", goldens=GOLDENS)
    for folder, more in ((at.tuned, []), (at.adapter, ["--lora", "on", "--lora_r", "2"])):
        words = GOOD["unlearn"].format(**vars(at), out=home).split()
        unlearn_harm_new.main([*words, "--stage", "acquire", "--model_save_dir", str(folder), *more])
    return at


@pytest.fixture
def made(models, tmp_path) -> Callable[[Bad], SimpleNamespace]:
    """Makes what a row needs, and returns the folders that its words name."""

    def make(bad: Bad) -> SimpleNamespace:
        if bad.skip:
            pytest.skip("cannot be made here")
        at = SimpleNamespace(**vars(models), here=tmp_path / "here", out=tmp_path / "out")
        at.here.mkdir()
        if bad.make:
            bad.make(at)
        return at

    return make


@pytest.fixture
def is_refused(made, models, tmp_path, monkeypatch, capsys) -> Callable[[Bad], None]:
    """Checks that a command refuses a row's input and changes no file."""

    def check(bad: Bad) -> None:
        at = made(bad)
        monkeypatch.setattr(fetch_truthfulqa, "HERE", at.here)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
            monkeypatch.delenv(variable, raising=False)
        if bad.stub:
            function, error = bad.stub

            def refuse(*_, **__):
                raise error

            monkeypatch.setattr(function, refuse)
        watched = [tmp_path, models.base, models.tuned, ROOT / "logs", ROOT / "models", ROOT / "dataloader"]
        before = listing(*watched)
        words = words_of(bad, at)
        try:
            code = exit_code(lambda: MAINS[bad.command](words))
        except SystemExit as stop:
            code = stop.code
        check_refusal(code, capsys.readouterr().err, bad.fix)
        assert listing(*watched) == before

    return check


@pytest.fixture
def is_refused_as_a_script(made, tmp_path) -> Callable[[Bad], None]:
    """The same of the command as a process of its own."""

    def check(bad: Bad) -> None:
        at = made(bad)
        before = listing(tmp_path)
        script = [sys.executable, ROOT / SCRIPTS[bad.command], *words_of(bad, at)]
        done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
        check_refusal(done.returncode, done.stderr, bad.fix)
        assert listing(tmp_path) == before

    return check
