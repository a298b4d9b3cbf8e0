"""A headless Chromium, controlled over the DevTools pipe, for tests of the viewer and of web pages."""
import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time

import pytest
from PIL import Image

FLAGS = ["--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--use-gl=angle", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader", "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--disable-default-apps", "--disable-dev-shm-usage", "--hide-scrollbars"]


class Chromium:
    """One page of a browser with its own profile; `requests` lists the addresses that it has requested."""

    def __init__(self, profile, width=640, height=400):
        if not shutil.which("chromium"):
            pytest.skip("no Chromium: apt-get install chromium")
        command = ["chromium", *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        theirs, self.write = os.pipe()
        self.read, ours = os.pipe()

        def pipes():  # Chromium reads commands from descriptor 3 and answers on 4
            high = [fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in (theirs, ours)]
            os.dup2(high[0], 3), os.dup2(high[1], 4)
        self.process = subprocess.Popen(command, preexec_fn=pipes, pass_fds=(3, 4), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(ours)
        self.number, self.rest, self.requests, self.errors, self.session = 0, b"", [], [], None
        page = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.target = page["targetId"]
        self.session = self("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, timeout=60, **params):
        """Send a DevTools command and return its result; AssertionError for an error, TimeoutError for no answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for answer in self._messages(end - time.monotonic()):
                if answer.get("id") == self.number:
                    assert "error" not in answer, answer["error"]
                    return answer["result"]
        raise TimeoutError(method)

    def _messages(self, seconds):
        """Yield the messages that arrive within so many seconds."""
        if select.select([self.read], [], [], max(seconds, 0))[0]:
            self.rest += os.read(self.read, 2 ** 20)
        *whole, self.rest = self.rest.split(b"\0")
        for message in map(json.loads, whole):
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            yield message

    def goto(self, address):
        """Open a page and wait until it is loaded."""
        self("Page.navigate", url=address)
        self.until(f"document.readyState == 'complete' && location.href.startsWith({address!r})")

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script, seconds=30):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def box(self, selector):
        """x, y, width and height in pixels of the first element that a selector finds."""
        return self.run(f"(r => [r.x, r.y, r.width, r.height])(document.querySelector({selector!r})"
                        ".getBoundingClientRect())")

    def picture(self):
        """A screenshot of the page, a PIL picture."""
        shot = self("Page.captureScreenshot", format="png")
        return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")

    def mouse(self, kind, x, y, **more):
        """Send a mouse event: mousePressed, mouseMoved or mouseReleased."""
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **({"button": "left", "clickCount": 1} | more))

    def close(self):
        self.process.terminate()
        self.process.wait(10)
        os.close(self.read), os.close(self.write)
