"""The study's page in a real browser. Needs Debian's ``chromium``."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archipel.study.page import write_page

pytestmark = pytest.mark.system
_CHROMIUM = runpy.run_path(str(Path(__file__).parents[1] / "report" / "chromium.py"))
write_study = runpy.run_path(str(Path(__file__).parent / "page_fixture.py"))["write_study"]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    one = _CHROMIUM["Browser"](tmp_path / "profile")
    yield one
    one.close()


def test_the_study_in_a_browser(tmp_path: Path, browser: Any) -> None:
    browser.open(write_page(write_study(tmp_path / "study")))
    assert browser.run(
        "Promise.all(Array.from(document.images, i => i.decode().then(() => 1, () => 0))).then(a => a.every(Boolean))"
    )
    assert browser.run("document.images.length") == 128
    assert browser.run("document.scripts.length") == 1
    # The style sheet's hash in the policy is right, else nothing would be laid out.
    assert browser.run("getComputedStyle(document.querySelector('main')).maxWidth") == "1360px"
    moving = "Array.from(document.querySelectorAll('img.clip')).filter(i => i.currentSrc === i.src).length"
    assert browser.run(moving) == 128
    browser.run("document.getElementById('motion').click(); new Promise(done => setTimeout(done, 400))")
    assert browser.run(moving) == 0
    box = "document.querySelector('table.results').parentElement"
    for width in (360, 420, 800, 1400, 1920):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        # The page does not scroll sideways; the main table does, in its own box, with the arms' names in sight.
        assert browser.run("document.documentElement.scrollWidth") <= width
        browser.run(f"{box}.scrollLeft = 1e6")
        first = f"{box}.querySelector('tbody tr:nth-child(2) th').getBoundingClientRect().left"
        assert browser.run(f"Math.abs({first} - {box}.getBoundingClientRect().left)") < 2
        if width <= 800:
            assert browser.run(f"{box}.scrollLeft") > 100
    for scheme in ("dark", "light"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for selector, least in ((".lead", 7), (".results small", 4.5), (".results thead th", 4.5), (".told", 4.5)):
            assert browser.run(_CHROMIUM["CONTRAST"].replace("SELECTOR", selector)) >= least, (scheme, selector)
    assert browser.names("Runtime.exceptionThrown") == [] and browser.names("Runtime.consoleAPICalled") == []
    assert [entry["entry"]["text"] for entry in browser.names("Log.entryAdded")] == []
    asked = [sent["request"]["url"] for sent in browser.names("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
