"""A headless Chromium, driven through the WebDriver protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER, BROWSER = (
    shutil.which("chromedriver"),
    shutil.which("chromium") or shutil.which("google-chrome"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, address: str):
        self._address = address
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
        ]
        options = {
            "goog:chromeOptions": {"binary": BROWSER, "args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": options}})[
            "sessionId"
        ]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._address + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def _do(self, path: str, body: Any = None, method: str = "POST") -> Any:
        return self._ask(
            method,
            f"/session/{self._session}{path}",
            {} if body is None and method == "POST" else body,
        )

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._do("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.resize(width, height)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", features=scheme)
        self._do("/url", {"url": path.absolute().as_uri()})

    def resize(self, width: int, height: int = 900) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a JavaScript function body and return its value."""
        return self._do("/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        self.run(
            "const n = document.querySelector(arguments[0]); "
            "n.scrollIntoView({block: 'center'}); n.click()",
            selector,
        )

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse over an element, to a position in fractions of its size."""
        box = self.run(
            "const n = document.querySelector(arguments[0]); n.scrollIntoView({block: 'center'}); "
            "const b = n.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]",
            selector,
        )
        at = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        self.devtools("Input.dispatchMouseEvent", type="mouseMoved", **at)

    def press(self, selector: str, key: str) -> None:
        """Focus an element and press a key."""
        self.run("document.querySelector(arguments[0]).focus({preventScroll: true})", selector)
        for kind in ("rawKeyDown", "keyUp"):
            self.devtools("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def complaints(self) -> list[str]:
        """Return console errors since the last call, including violations of the page's policy."""
        return [entry["message"] for entry in self._do("/se/log", {"type": "browser"})]

    def screenshot(self, out: Path, *, whole: bool = False) -> None:
        extra: dict[str, Any] = {}
        if whole:
            size = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
            extra = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        out.write_bytes(
            base64.b64decode(self.devtools("Page.captureScreenshot", format="png", **extra)["data"])
        )

    def pdf(self) -> bytes:
        """Return the printed page as PDF."""
        return base64.b64decode(self._do("/print", {}))

    def close(self) -> None:
        self._do("", method="DELETE")


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser and close it at the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    try:
        _wait(port)
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def _wait(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("chromedriver does not answer")
