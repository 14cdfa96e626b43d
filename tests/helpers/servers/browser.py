"""A headless Chromium, driven by its DevTools protocol over a pipe."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60  # seconds


class Page:
    """A page of the browser.

    Attributes:
        console: what was written to its console, and what its content policy refused.
    """

    def __init__(self, commands: int, events: int):
        self._commands, self._events = commands, os.fdopen(events, "rb", closefd=False)
        self._number, self._session, self.console = 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict:
        """The result of a command of the protocol."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = json.loads(self._read())
            if message.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.console.append(message["params"])
            if message.get("id") == self._number:
                assert "result" in message, message
                return message["result"]

    def _read(self) -> bytes:
        message = bytearray()
        while (byte := self._events.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        return bytes(message)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < until, f"never true: {script}"
            time.sleep(0.05)

    def open(self, address: str, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        """Load a page at a size in CSS pixels; 500 and less is a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width <= 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=address)
        self.wait_for(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")

    def type(self, text: str) -> None:
        """Type into what has the focus, and press Enter."""
        self.send("Input.insertText", text=text)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, **key)

    def picture(self, path: Path) -> None:
        """Save what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A page of a browser whose files are in the folder `profile`."""
    # The browser's ends of the pipes have to be its files 3 and 4; numbers above 10 cannot be in the shell's way.
    ends = [end for pipe in (os.pipe(), os.pipe()) for end in pipe]
    for_browser = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (ends[0], ends[3])]
    command = f'exec "$@" 3<&{for_browser[0]} 4>&{for_browser[1]}'
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    flags += ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
    browser = subprocess.Popen(
        ["bash", "-c", command, "bash", CHROMIUM, *flags],
        pass_fds=for_browser,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (ends[0], ends[3], *for_browser):
        os.close(end)
    try:
        yield Page(ends[1], ends[2])
    finally:
        browser.terminate()
        browser.wait()
        os.close(ends[1])
        os.close(ends[2])
