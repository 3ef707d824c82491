"""Chromium without a window, driven through its DevTools protocol.

Source of the protocol: https://chromedevtools.github.io/devtools-protocol
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 20.0  # the longest time to wait for anything


class Page:
    """The page that the browser shows.

    Args:
      commands: file descriptor to which the browser listens.
      answers: file descriptor to which it writes.

    Attributes:
      problems: errors of scripts, violations of the security policy, and failed requests.
    """

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers, self._rest = commands, answers, b""
        self._session: str | None = None
        self._number = 0
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._answers], [], [], SECONDS)[0], "the browser hangs"
            received = os.read(self._answers, 1 << 16)
            assert received, "the browser ended"
            self._rest += received
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(details.get("exception", details).get("description", "error"))
        elif event.get("method") == "Log.entryAdded":
            entry = parameters["entry"]
            self.problems.append(f"{entry['text']} {entry.get('url', '')}")

    def open(self, url: str) -> None:
        """Show an address, and wait until it has loaded."""
        self.problems = []
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        options = {"returnByValue": True, "allowUnsafeEvalBlockedByCSP": False}
        result = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + SECONDS
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression}\n{self.value('document.body.innerText')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Return the visible text of the first element that a CSS selector finds."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        find = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{find}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.value(f"{find}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field by typing."""
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, control: bool = False) -> None:
        """Press a key: "Enter" or "Tab"."""
        code, text = {"Enter": (13, "\r"), "Tab": (9, "")}[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        for kind in ("keyDown", "keyUp"):
            modifiers = 2 if control else 0
            self.call("Input.dispatchKeyEvent", type=kind, modifiers=modifiers, **event)

    def show_as(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window, and the color scheme that the user prefers."""
        phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "mobile": phone, "deviceScaleFactor": 1 + phone},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def save_screenshot(self, path: Path) -> None:
        """Write what the window shows to a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """Run a browser.

    Args:
      profile: an empty folder for its files.
    """
    from_us, commands = os.pipe()
    answers, to_us = os.pipe()
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    arguments += ["--no-first-run", "--disable-extensions", f"--user-data-dir={profile}"]
    # The browser reads from descriptor 3 and writes to descriptor 4.
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "bash", str(CHROMIUM), *arguments],
        pass_fds=[from_us, to_us],
        stderr=subprocess.DEVNULL,
    )
    os.close(from_us)
    os.close(to_us)
    try:
        yield Page(commands, answers)
    finally:
        process.kill()
        process.wait()
        os.close(commands)
        os.close(answers)
