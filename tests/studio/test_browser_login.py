"""Logging in with a key, in a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.studio.conftest import KEY, Studio

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]  # the first one waits for a training


@pytest.fixture(scope="module")
def locked(trained: Path, start: Callable[..., Studio], tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return start(trained, "--state", str(tmp_path_factory.mktemp("locked")), key=KEY, verb="serve")


def test_a_key_opens_the_pages_and_nothing_else_does(locked: Studio, visit: Callable[..., Any]) -> None:
    page = visit(locked, "/docs", login=False)
    assert page.url.endswith("/login")
    page.watch.allowed = [r"401"]
    page.fill("#key", "another key")
    page.press("#key", "Enter")
    assert "not a key" in page.inner_text("[role=alert]")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_url("**/docs")
    assert "videos" in page.inner_text("main")
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and page.evaluate("document.cookie") == ""
