"""A headless Chromium, driven over a pipe in the protocol of its own developer tools; needs no other package."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """A page in Chromium.

    Args:
        folder: of the browser's profile.
        width: of the window, in pixels.
        height: of the window.
        dark: whether the user prefers dark pages.
    """

    def __init__(self, folder: Path, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        theirs, self.requests = os.pipe()
        self.answers, mine = os.pipe()
        options = f"--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir={folder}"
        command = f"exec {CHROMIUM} {options} --remote-debugging-pipe 3<&{theirs} 4>&{mine} >/dev/null 2>&1"
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(theirs, mine))
        os.close(theirs)
        os.close(mine)
        self.number, self.read, self.session = 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.read:
                part = os.read(self.answers, 1 << 16)
                assert part, "Chromium ended"
                self.read += part
            line, _, self.read = self.read.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, code: str) -> Any:
        """Return the value of an expression, a promise's when it is kept."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && document.getElementById('served').textContent")

    def wait_for(self, code: str) -> None:
        """Wait until an expression is true, up to 20 s."""
        kept = self.evaluate(
            f"new Promise(done => {{ let left = 400; const look = () => ({code}) ? done(true)"
            " : --left ? setTimeout(look, 50) : done(false); look(); })"
        )
        assert kept, code

    def click(self, element: str) -> None:
        """Click in the middle of an element, by its id, as a mouse does."""
        x, y = self.evaluate(
            f"(() => {{ const one = document.getElementById('{element}'); one.scrollIntoView({{block: 'center'}});"
            " const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, element: str, text: str) -> None:
        self.click(element)
        self.call("Input.insertText", text=text)

    def photograph(self, path: Path) -> None:
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        self.session = ""
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self.requests)
        os.close(self.answers)
