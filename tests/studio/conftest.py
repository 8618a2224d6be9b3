"""A tiny trained run, the studio on it in a process of its own, and Debian's chromium looking at it.

What a page may not do fails the test that opened it: a request to another origin, an error in the console, a script's
exception, an answer of 500 or more. Pictures lie in ``build/studio`` afterwards.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.listening import Listening

KEY = "a-key-of-the-studio"
WIDE, NARROW = 1280, 400  # pixels: the two widths that the studio is made for
SHOTS = Path(__file__).parents[2] / "build" / "studio"
CHROMIUM = "/usr/bin/chromium"
SETTINGS = [
    "clips.count=48", "expert.steps=40", "expert.checkpoint_every=20", "expert.validate_every=10",
    "router.steps=20", "router.checkpoint_every=10", "sample.steps=3",
]  # fmt: skip
# One process for all stages: most of their time would be imports.
MAKE = """
import sys
from archipel import pipeline
from archipel.making import init
run = init(sys.argv[1], source="shapes", preset="tiny", sets=sys.argv[2:])
pipeline.prepare(run)
pipeline.partition(run)
for name in run.job_names:
    pipeline.train(run, name, threads=1)
pipeline.route(run)
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of shapes in two clusters: experts, monolith and router trained for some steps. To be read only, but for
    ``serving/``, which the studio writes."""
    root = tmp_path_factory.mktemp("studio") / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ARCHIPEL_CACHE": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run(
        [sys.executable, "-c", MAKE, str(root), *SETTINGS],
        env=env,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root


class Studio(Listening):
    """``archipel studio``."""

    def __init__(self, where: str | Path, *options: str, key: str = "", verb: str = "studio") -> None:
        super().__init__(verb, where, *options, key=key)


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Studio]]:
    """``start(where, *options, key="")``: another studio; whatever still lives at the end is killed."""
    everyone: list[Studio] = []

    def begin(where: str | Path, *options: str, **given: Any) -> Studio:
        everyone.append(Studio(where, *options, **given))
        return everyone[-1]

    yield begin
    for one in everyone:
        one.kill()


@pytest.fixture(scope="session")
def studio(trained: Path, start: Callable[..., Studio], tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """The studio as it starts on somebody's own machine: no key. Left running for all tests."""
    return start(trained, "--state", str(tmp_path_factory.mktemp("state")))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    unsafe = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses its sandbox to root
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*unsafe, "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield opened
        opened.close()


class Watch:
    """What a page did that it should not. ``allowed``: patterns of console errors that a test provokes on purpose."""

    def __init__(self, origin: str) -> None:
        self.host = urlsplit(origin).netloc
        self.allowed: list[str] = []
        self.seen: list[str] = []

    def look_at(self, page: Any) -> None:
        page.on("request", lambda request: self._address("request", request.url))
        page.on("websocket", lambda socket: self._address("websocket", socket.url))
        page.on("console", lambda said: self._said(said.type, f"{said.text} ({said.location.get('url', '')})"))
        page.on("pageerror", lambda error: self._said("error", str(error)))
        page.on("response", lambda got: self._said("error", f"{got.status} {got.url}") if got.status >= 500 else None)

    def _address(self, what: str, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "about") and parts.netloc != self.host:
            self.seen.append(f"{what} to another origin: {url[:200]}")

    def _said(self, kind: str, text: str) -> None:
        if kind == "error":
            self.seen.append(f"error: {text[:500]}")

    def check(self) -> None:
        wrong = [one for one in self.seen if not any(re.search(pattern, one) for pattern in self.allowed)]
        assert not wrong, "\n".join(wrong)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """``visit(studio, width=1280, dark=False) -> page`` in a browser profile of its own, logged in where the studio has a
    key (``login=False``: not). ``page.watch.allowed`` takes patterns of errors that are meant to come."""
    with contextlib.ExitStack() as stack:
        watches = []

        def go(studio: Studio, path: str = "/", *, width: int = WIDE, dark: bool = False, login: bool = True) -> Any:
            context = browser.new_context(
                base_url=studio.url,
                viewport={"width": width, "height": 900},
                color_scheme="dark" if dark else "light",
                reduced_motion="reduce",
            )
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(120_000)  # nothing here is about speed
            page.watch = Watch(studio.url)
            page.watch.look_at(page)
            watches.append(page.watch)
            if studio.key and login:
                page.goto("/login")
                page.fill("#key", studio.key)
                page.press("#key", "Enter")
                page.wait_for_load_state()
            page.goto(path)
            return page

        yield go
        stack.close()
        for watch in watches:
            watch.check()


@pytest.fixture
def page(visit: Callable[..., Any], studio: Studio) -> Any:
    """The studio's page, 1280 pixels wide, in light."""
    return visit(studio)


@pytest.fixture(scope="session")
def shoot() -> Callable[..., Path]:
    """``shoot(page, "generate")`` keeps a picture of the whole page as build/studio/generate-<width>.png."""

    def take(page: Any, name: str, *, whole: bool = True) -> Path:
        SHOTS.mkdir(parents=True, exist_ok=True)
        width = page.viewport_size["width"]
        path = SHOTS / f"{name}-{width}.png"
        page.screenshot(path=path, full_page=whole)
        return path

    return take
