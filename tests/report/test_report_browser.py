"""The page in a real browser: no console message, no request, every picture decodes, buttons and widths work.

Needs Debian's ``chromium``.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archipel.report import report
from archipel.run import Run

pytestmark = pytest.mark.system
_CHROMIUM = runpy.run_path(str(Path(__file__).parent / "chromium.py"))
Browser, CONTRAST = _CHROMIUM["Browser"], _CHROMIUM["CONTRAST"]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    one = Browser(tmp_path / "profile")
    yield one
    one.close()


def test_the_page_in_a_browser(all_pictures: Run, browser: Any) -> None:
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


def test_dark_mode_and_wishes_for_less_motion(full_run: Run, browser: Any) -> None:
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
