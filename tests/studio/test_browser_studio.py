"""Making clips in the browser: one, several beside each other, what is refused, and a reload in the middle."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from tests.studio.conftest import KEY, NARROW, Studio

pytestmark = pytest.mark.system

PROMPT = "What shall the clip show?"


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def playing(page: Any, prompt: str) -> Any:
    """The clip of ``prompt``, once it can be played."""
    page.wait_for_selector(f"#stage:has-text('{prompt}') video", timeout=120_000)
    clip = page.locator("#stage video").first
    clip.evaluate("clip => clip.readyState >= 2 || new Promise(done => clip.addEventListener('loadeddata', done))")
    return clip


def ask(page: Any, prompt: str) -> None:
    box = page.get_by_label(PROMPT)
    box.wait_for()
    page.wait_for_selector("#stage :is(.clip-card, .nothing-yet)")
    box.fill(prompt)
    box.press("Enter")


def test_a_clip_is_asked_for_by_keyboard_plays_and_downloads(page: Any, shoot: Callable[..., Any]) -> None:
    assert page.url.endswith("/studio/")
    page.get_by_label("Seed").fill("7")
    ask(page, "a red ball bounces")
    clip = playing(page, "a red ball bounces")
    assert clip.get_attribute("loop") is not None and clip.evaluate("clip => clip.videoWidth") == 64
    said = page.inner_text("#stage")
    assert "a red ball bounces" in said and "seed 7" in said and "expert calls" in said
    assert page.locator("#stage figure.weights rect").count() >= 3 and "noise" in said
    with page.expect_download() as download:
        page.get_by_role("link", name="Download MP4").first.click()
    assert download.value.suggested_filename.endswith(".mp4")
    assert download.value.path().read_bytes()[4:8] == b"ftyp"
    shoot(page, "generate")


def test_the_page_fits_a_telephone_and_a_dark_room(
    studio: Studio, visit: Callable[..., Any], shoot: Callable[..., Any]
) -> None:
    page = visit(studio, width=NARROW, dark=True)
    ask(page, "a blue square turns")
    playing(page, "a blue square turns")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= NARROW, f"{wide} pixels wide"
    shoot(page, "generate-dark")


def test_several_ways_side_by_side_from_one_noise(page: Any, shoot: Callable[..., Any]) -> None:
    tab(page, "Compare")
    page.get_by_label("What shall all of them show?").fill("a green star")
    page.get_by_role("checkbox", name="Expert 0").check()
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("#comparison:not(:has(.making)) table.costs", timeout=120_000)
    assert page.locator("#comparison video").count() == 3
    heads = page.locator("#comparison h3").all_inner_texts()
    assert "Monolith" in heads and "Expert 0" in heads
    assert len(re.findall(r"seed \d+", page.inner_text("#comparison"))) == 1
    shoot(page, "compare")
    page.get_by_role("checkbox", name="Expert 0").uncheck()
    page.get_by_role("checkbox", name="Monolith").uncheck()
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("#comparison .notice")
    assert "two or more" in page.inner_text("#comparison .notice")


def test_what_cannot_be_done_is_said_in_words(page: Any, shoot: Callable[..., Any]) -> None:
    page.get_by_label("Seed").fill("soon")
    ask(page, "a cube")
    page.wait_for_selector("#stage .notice")
    assert "Seed must be a whole number" in page.inner_text("#stage .notice")
    page.get_by_label("Seed").fill("")
    ask(page, "")
    page.wait_for_selector("#stage .notice:has-text('empty')")
    shoot(page, "error")


def test_a_reload_in_the_middle_finds_the_clip_again(page: Any, shoot: Callable[..., Any]) -> None:
    page.get_by_label(PROMPT).wait_for()
    page.watch.allowed = ["AbortError", "Connection errored out"]  # of the page that is left
    busy = []
    for number in range(6):  # of other settings each, so that they are made one after the other
        job = {"prompt": "busy", "steps": 200 - number, "strategy": "full"}
        busy.append(page.request.post("/v1/videos", data=job).json()["id"])
    ask(page, "a purple ring")
    page.wait_for_selector("#stage .making")
    page.reload()
    page.wait_for_selector("#stage .making")
    assert "a purple ring" in page.inner_text("#stage") and page.get_by_label(PROMPT).input_value() == "a purple ring"
    shoot(page, "waiting")
    for name in busy:
        page.request.delete(f"/v1/videos/{name}")
    playing(page, "a purple ring")
    page.reload()
    playing(page, "a purple ring")  # what was made last is there as well


def test_a_clip_can_be_cancelled(page: Any) -> None:
    page.get_by_label(PROMPT).wait_for()
    busy = page.request.post("/v1/videos", data={"prompt": "busy", "steps": 200, "strategy": "full"}).json()["id"]
    ask(page, "never made")
    page.get_by_role("button", name="Cancel").first.click()
    page.wait_for_selector("#stage .notice:has-text('cancelled')")
    page.request.delete(f"/v1/videos/{busy}")
    assert "never made" not in str(page.request.get("/v1/videos?limit=100").json())


def test_the_gallery_keeps_clips_with_their_settings(page: Any, shoot: Callable[..., Any]) -> None:
    page.get_by_label("Seed").fill("4242")
    ask(page, "a yellow triangle")
    playing(page, "a yellow triangle")
    tab(page, "Gallery")
    page.wait_for_selector(".slot video")
    assert "seed 4242" in page.locator(".slot").first.inner_text()
    shoot(page, "gallery")
    page.get_by_role("button", name="Use settings").first.click()
    page.get_by_label("Seed").first.wait_for(state="visible")
    page.wait_for_timeout(500)
    assert page.get_by_label("Seed").first.input_value() == "4242"
    tab(page, "Gallery")
    page.wait_for_selector(".slot:has-text('seed 4242')")
    page.get_by_role("button", name="Delete").first.click()
    page.wait_for_selector(".slot:has-text('seed 4242')", state="detached")


def test_one_keys_clips_are_not_the_others(
    trained: Any, start: Callable[..., Studio], visit: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    locked = start(trained, "--state", str(tmp_path_factory.mktemp("two-keys")), key=f"{KEY},other")
    locked.key = KEY
    page = visit(locked)
    ask(page, "only mine")
    playing(page, "only mine")
    locked.key = "other"
    page = visit(locked)
    page.wait_for_selector("#stage .nothing-yet")
    assert "only mine" not in page.inner_text("body") and not page.get_by_label(PROMPT).input_value()
