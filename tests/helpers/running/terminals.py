"""A process in a pseudo-terminal."""

import os
import pty
import select
import signal
import time
from collections.abc import Callable

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """Runs `work` in a fork of this process whose terminal this is.

    Attributes:
        screen: all that was written.
    """

    def __init__(self, work: Callable[[], int], patience: float = 60):
        self.screen, self._seen, self._patience = "", 0, patience
        self.process, self._end = pty.fork()
        if self.process == 0:
            code = 99
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = work()
            finally:
                os._exit(code)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._end, text.encode())

    def wait_for(self, text: str) -> str:
        """Wait until this is written, behind what was waited for before. Returns what was written until then."""
        until = time.monotonic() + self._patience
        while (at := self.screen.find(text, self._seen)) < 0:
            assert time.monotonic() < until and self._read(until), f"no {text!r} in {self.screen[self._seen :]!r}"
        before, self._seen = self.screen[self._seen : at], at + len(text)
        return before

    def read(self, length: int) -> str:
        """The next characters that are written."""
        until = time.monotonic() + self._patience
        while len(self.screen) < self._seen + length:
            assert self._read(until), f"only {self.screen[self._seen :]!r}"
        self._seen += length
        return self.screen[self._seen - length : self._seen]

    def end(self) -> int:
        """Wait for the end. Returns the exit code."""
        until = time.monotonic() + self._patience
        while self._read(until):
            pass
        os.close(self._end)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def _read(self, until: float) -> bool:
        ready, _, _ = select.select([self._end], [], [], max(0, until - time.monotonic()))
        if not ready:
            self.kill()
            return False
        try:
            written = os.read(self._end, 65536)
        except OSError:  # Linux says so at the end
            return False
        self.screen += written.decode(errors="replace")
        return bool(written)
