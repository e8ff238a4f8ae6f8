"""A real browser without a window, spoken to over a pipe by Chrome's own DevTools protocol: the standard library is enough.

https://chromedevtools.github.io/devtools-protocol/ ; `--remote-debugging-pipe` reads file descriptor 3 and writes 4, each message
ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell", "microsoft-edge")
MISSING = "no browser found: install one of " + ", ".join(NAMES) + " (on Debian: apt install chromium), or name one in PARTIALS_BROWSER"
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
BOOT = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
SECONDS = 60


def found() -> str | None:
    """The browser of this machine."""
    named = os.environ.get("PARTIALS_BROWSER")
    return next(filter(None, map(shutil.which, [named] if named else NAMES)), None)


class Page:
    """One page, and everything that it asked for or complained about."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing, self.waiting, self.number = reading, writing, b"", 0
        self.session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while (answer := self.next()).get("id") != self.number:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def next(self) -> dict[str, Any]:
        """The next message; events are noted."""
        while b"\0" not in self.waiting:
            more = os.read(self.reading, 1 << 16)
            assert more, "the browser went away"
            self.waiting += more
        first, _, self.waiting = self.waiting.partition(b"\0")
        message = json.loads(first)
        event, told = message.get("method", ""), message.get("params", {})
        if event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(told))
        elif event == "Page.loadEventFired":
            self.loaded = True
        return message

    def open(self, path: Path, *, dark: bool = False, width: int = 1000) -> None:
        """Load a file and wait until it is shown."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.loaded, self.requests, self.complaints = False, [], []
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self.next()

    def value(self, expression: str) -> Any:
        """What JavaScript says of the page (the DevTools may ask it where the page itself may not run any)."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@contextmanager
def browser(command: str) -> Iterator[Page]:
    """A browser with an empty profile of its own, ended afterwards."""
    (there, writing), (reading, back) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [command, *QUIET.split(), f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-c", BOOT, str(there), str(back), *words],
            pass_fds=(there, back),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there), os.close(back)
        try:
            page = Page(reading, writing)
            yield page
            page.session = None
            page.call("Browser.close")
            process.wait(SECONDS)
        finally:
            process.kill()
            process.wait()
            os.close(reading), os.close(writing)
