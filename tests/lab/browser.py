"""Headless Chromium by the WebDriver protocol, which is JSON over HTTP: nothing but the standard library."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = shutil.which("chromedriver")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = None if DRIVER and CHROMIUM else "needs Chromium and chromedriver (apt-get install chromium chromium-driver)"

_OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
_OPTIONS += [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


class Browser:
    """A window with one page."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._session = ""
        self._profile = tempfile.TemporaryDirectory()
        options = {"binary": CHROMIUM, "args": [*_OPTIONS, f"--user-data-dir={self._profile.name}"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._session = self._call("POST", "/session", {"capabilities": wanted})["sessionId"]

    def open(self, page: Path | str, *, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        """Load a file or an address in a window of this size and wait until it is drawn; the token viewer says when."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self._call(
            "POST", f"/session/{self._session}/url", {"url": page if isinstance(page, str) else page.resolve().as_uri()}
        )
        limit = time.monotonic() + 60
        drawn = "performance.getEntriesByName('drawn').length"
        ready = f"document.getElementById('panels') ? {drawn} : document.readyState === 'complete'"
        while not self.run(f"return {ready}"):
            assert time.monotonic() < limit, "the page was not drawn"
            time.sleep(0.02)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a piece of JavaScript returns."""
        return self._call("POST", f"/session/{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def settled(self) -> None:
        """Wait until what was asked for is drawn."""
        script = "const done = arguments[0]; setTimeout(() => requestAnimationFrame(() => setTimeout(done)), 60)"
        self._call("POST", f"/session/{self._session}/execute/async", {"script": script, "args": []})

    def press(self, key: str, *, shift: bool = False) -> None:
        for kind in ("keyDown", "keyUp"):
            self.devtools("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift)
        self.settled()

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.devtools("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settled()

    def point(self, x: float, y: float) -> None:
        self.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settled()

    def faults(self) -> str:
        """What is wrong with the look of the page, a line each: too wide, cut, pale, too small, ..."""
        script = Path(__file__).with_name("faults.js").read_text(encoding="utf-8")
        for _ in range(4):  # what a scroll drives shows with a later picture, on a busy machine much later
            self.settled()
            if not (found := str(self.run(script))):
                break
        return found

    def look(self, page: Path) -> str:
        """The faults of a page on a telephone and on a desk, by day and by night; "" if there are no such."""
        out = []
        for width in (400, 1400):
            for dark in (False, True):
                self.open(page, width=width, dark=dark)
                if faults := self.faults():
                    out.append(f"{width} pixels, {'dark' if dark else 'light'}:\n{faults}")
        return "\n".join(out)

    def errors(self) -> list[str]:
        """What the console was told as an error."""
        entries = self._call("POST", f"/session/{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", f"/session/{self._session}/screenshot")))

    def devtools(self, command: str, **parameters: Any) -> Any:
        body = {"cmd": command, "params": parameters}
        return self._call("POST", f"/session/{self._session}/goog/cdp/execute", body)

    def close(self) -> None:
        self._call("DELETE", f"/session/{self._session}")
        self._profile.cleanup()

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:1000]) from None


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser, and the end of it."""
    assert DRIVER is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 30
        while True:
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < limit, "chromedriver does not listen"
            time.sleep(0.05)
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait()
