"""How a command ends: exit codes, signals, and the parser's errors."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from harmful_unlearn.cli.flag_parser import FlagParser
from harmful_unlearn.cli.flag_types import device_map, number, share
from harmful_unlearn.cli.running import exit_code, one_line, stop_asked
from harmful_unlearn.errors import Diverged, NoSafeAnswers, Stopped, UserError
from harmful_unlearn.storage.files import ROOT


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("fix it"), 2, "error: fix it"),
        (Diverged("lower --lr"), 2, "error: lower --lr"),
        (NoSafeAnswers("use another method"), 2, "error: use another method"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped(signal.SIGTERM, "stopped after step 3"), 143, "stopped after step 3"),
        (OSError(errno.ENOSPC, "No space left", "out.bin"), 2, "out.bin: No space left: free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "out.bin"), 2, "out.bin: Permission denied"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
    ],
)
def test_exit_codes(error, code, message, capsys):
    def main():
        raise error

    assert exit_code(main) == code
    assert message in capsys.readouterr().err


def test_bugs_keep_their_traceback():
    for bug in (RuntimeError("a bug"), OSError(errno.EBADF, "ours"), KeyError("x")):

        def main(bug=bug):
            raise bug

        with pytest.raises(type(bug)):
            exit_code(main)


def test_an_error_names_its_process(monkeypatch, capsys):
    def main():
        raise UserError("fix it")

    monkeypatch.setenv("RANK", "3")
    assert exit_code(main) == 2
    assert capsys.readouterr().err == "error (process 3): fix it\n"


def test_sigterm_ends_a_command_and_is_handled_as_before_afterwards(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    assert "no folder was left half-written" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_is_an_exception_again_once_a_command_runs(capsys):
    """`before_imports` has made it end the process while the libraries were imported."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert exit_code(lambda: signal.raise_signal(signal.SIGINT)) == 130
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second, ending", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_a_first_signal_asks_and_a_second_one_stops(first, second, ending, capsys):
    before = signal.getsignal(first)
    with stop_asked() as asked:
        assert asked() == 0
        signal.raise_signal(first)
        assert asked() == first
        with pytest.raises(ending):
            signal.raise_signal(second)
        assert asked() == first
    assert capsys.readouterr().err.count("once more to stop at once") == 1
    assert signal.getsignal(first) is before


def test_only_the_main_thread_takes_signals():
    results = []

    def work():
        with stop_asked() as asked:
            results.append(asked())
        results.append(exit_code(lambda: None))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [0, 0]


def test_a_message_is_one_printable_line():
    assert one_line(" a\nb\x1b[31m\u2028c \n") == "a b [31m c"


@pytest.fixture
def parser() -> FlagParser:
    parser = FlagParser(prog="test")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--bad_weight", type=number, nargs="+")
    parser.add_argument("--bad_words")
    return parser


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch-size", "2"], "unknown argument --batch-size: did you mean --batch_size?"),
        (["--batch-size=2"], "did you mean --batch_size?"),
        (["--batchsize", "2"], "did you mean --batch_size?"),
        (["--bad", "2"], "did you mean --bad_weight or --bad_words?"),
        (["-batch_size", "2"], "did you mean --batch_size?"),
        (["--batch_size", "3", "stray"], "unknown argument stray (--help"),
        (["--batch_size", "x"], "--batch_size: invalid int value: 'x' (--help"),
        (["--bad_words", "a\udcff"], "'a\\udcff' is not UTF-8"),
        (["--bad_weight", "1\n\x1b[31m"], "give a finite number"),
    ],
)
def test_a_wrong_flag_is_one_line_that_suggests_the_right_one(words, message, parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith("error: ") and error.endswith("\n") and error.removesuffix("\n").isprintable()


def test_negative_numbers_may_have_an_exponent(parser):
    """argparse by itself takes -1e-3 for a flag."""
    assert parser.parse_args(["--bad_weight", "-1e-3", "-.5e1", "-2"]).bad_weight == [-1e-3, -5.0, -2.0]
    with pytest.raises(SystemExit):
        parser.parse_args(["--bad_weight", "-inf"])


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (share, "1.01", "give a number from 0 to 1"),
        (share, "nan", "give a number from 0 to 1"),
        (device_map, "everywhere", "give one of auto"),
        (device_map, "cuda:99", "give auto or cpu"),
    ],
)
def test_values_out_of_range(kind, text, message, capsys):
    parser = FlagParser(prog="test")
    parser.add_argument("--value", type=kind)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--value", text])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: --value: ") and message in error


@pytest.mark.parametrize("text", ["auto", "balanced_low_0", "cpu", "mps", "npu:3"])
def test_device_maps(text):
    assert device_map(text) == text


def test_a_progress_bar_that_goes_into_a_file_is_drawn_rarely():
    code = "import harmful_unlearn.cli.before_imports; from tqdm import trange; [time.sleep(.01) for _ in trange(50)]"
    here = {name: value for name, value in os.environ.items() if not name.startswith("TQDM")}  # tests may switch it off
    words = [sys.executable, "-c", f"import time; {code}"]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=here)
    assert result.stderr.count("\r") <= 3 and "50/50" in result.stderr
