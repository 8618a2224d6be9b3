"""The page in a real browser: no console message, no request, every picture decodes, buttons and widths work.

Needs Debian's ``chromium``. It is driven through its debugging pipe, which needs no further package.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archipel.report import report
from archipel.run import Run

pytestmark = pytest.mark.system
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)


class Browser:
    """One page of a headless chromium; ``events`` are all messages that it sent by itself."""

    def __init__(self, profile: Path) -> None:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        assert chromium, "this test needs a browser: apt-get install chromium"
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        # The pipe is file descriptors 3 (commands) and 4 (answers) of the browser.
        command = f'exec "$0" {FLAGS} "--user-data-dir=$1" about:blank 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, chromium, str(profile)],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._last, self.events = b"", 0, list[dict[str, Any]]()
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser has gone"
            self._buffer += piece
        one, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(one))

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def names(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    one = Browser(tmp_path / "profile")
    yield one
    one.close()


def test_the_page_in_a_browser(all_pictures: Run, browser: Browser) -> None:
    browser.open(report(all_pictures))
    assert browser.run(
        "Promise.all(Array.from(document.images, i => i.decode().then(() => 1, () => 0))).then(a => a.every(Boolean))"
    )
    assert browser.run("Array.from(document.images).every(i => i.naturalWidth >= 32)")
    # Captions that look like scripts did nothing.
    assert browser.run("document.scripts.length") == 1
    # The style sheet's hash in the policy is right, else nothing would be laid out.
    assert browser.run("getComputedStyle(document.querySelector('main')).maxWidth") == "1120px"
    # The pause button shows stills, and playing brings the moving pictures back.
    moving = "Array.from(document.querySelectorAll('img.clip')).filter(i => i.currentSrc === i.src).length"
    total = browser.run("document.querySelectorAll('img.clip').length")
    settle = "new Promise(done => setTimeout(done, 400))"
    assert browser.run(moving) == total
    browser.run(f"document.getElementById('motion').click(); {settle}")
    assert browser.run(moving) == 0 and browser.run("document.getElementById('motion').textContent") == "Play clips"
    browser.run(f"document.getElementById('motion').click(); {settle}")
    assert browser.run(moving) == total
    # No page-wide sideways scrolling, from a telephone to a wide screen.
    for width in (360, 500, 800, 1400):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.names("Runtime.exceptionThrown") == [] and browser.names("Runtime.consoleAPICalled") == []
    assert [entry["entry"]["text"] for entry in browser.names("Log.entryAdded")] == []
    asked = [sent["request"]["url"] for sent in browser.names("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    assert sum(url.startswith("file:") for url in asked) == 1


def test_dark_mode_and_wishes_for_less_motion(full_run: Run, browser: Browser) -> None:
    features = [
        {"name": "prefers-color-scheme", "value": "dark"},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.call("Emulation.setEmulatedMedia", features=features)
    (full_run.expert("0") / "card.json").unlink()  # so that something is missing
    browser.open(report(full_run))
    assert browser.run("document.getElementById('motion').textContent") == "Play clips"
    assert browser.run("Array.from(document.querySelectorAll('img.clip')).every(i => i.currentSrc !== i.src)")
    for scheme in ("dark", "light"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for selector, least in ((".lead", 7), (".over", 4.5), (".soft", 4.5), ("summary", 4.5), (".missing", 4.5)):
            assert browser.run(CONTRAST.replace("SELECTOR", selector)) >= least, (scheme, selector)


# WCAG 2.1 contrast ratio of an element's text over the nearest opaque background.
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = colour => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const part = Array.from(canvas.getImageData(0, 0, 1, 1).data).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const element = document.querySelector("SELECTOR");
  let back = element;
  while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
  const pair = [light(getComputedStyle(element).color), light(getComputedStyle(back).backgroundColor)].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
})()"""
