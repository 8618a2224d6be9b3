"""The partition's and the islands' pages in a browser, at both widths, in light and dark, and a store that goes away."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.studio.conftest import NARROW, WIDE, Studio

from archipel.run import Run

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]  # the first one waits for a training

HOSTILE = '</li></div><img src=x onerror="document.title=1"><script>document.title=2</script> {{7*7}} ${7*7} **a**'


def open_tab(page: Any, name: str) -> None:
    """A tab by its name, which may be in the menu of those that do not fit."""
    page.wait_for_selector("#tabs [role=tab][aria-selected=true]")
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.locator("#tabs .overflow-menu > button").click()
        tab = page.locator("#tabs .overflow-dropdown button", has_text=name)
    tab.click()


@pytest.fixture(scope="module")
def watched(
    trained: Path, start: Callable[..., Studio], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Studio, Path]:
    """A studio on a run with a hostile caption, whose islands work in a store beside it; and that store."""
    root = tmp_path_factory.mktemp("watched")
    run = Run.open(shutil.copytree(trained, root / "run"))
    captions = json.loads((run.partition / "captions.json").read_text())
    captions["0"][0]["caption"] = HOSTILE
    (run.partition / "captions.json").write_text(json.dumps(captions))
    bucket = root / "bucket"
    shutil.copytree(run.shard("0"), bucket / "shards" / "0")
    toml = (run.root / "run.toml").read_bytes()
    (bucket / "run.toml").write_bytes(toml)
    files = {"run.toml": {"sha256": run.id, "bytes": len(toml)}}
    listed = {"format": 1, "kind": "published", "run": run.id, "files": files}
    (bucket / "published.json").write_text(json.dumps(listed))
    beat(bucket, 4)
    return start(run.root, "--store", str(bucket), "--state", str(root / "state")), bucket


def beat(bucket: Path, step: int) -> None:
    said = {
        "claims/00000001.json": {"nonce": "n", "island": "reef-1"},
        "00000001/heartbeat.json": {
            "nonce": "n",
            "state": "working",
            "step": step,
            "loss": 2 - step / 40,
            "steps_per_s": 1.0,
        },
    }
    for name, value in said.items():
        path = bucket / "jobs" / "0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_pages_fit_and_tell_what_there_is(
    watched: tuple[Studio, Path], visit: Callable[..., Any], shoot: Callable[..., Path], width: int, dark: bool
) -> None:
    page = visit(watched[0], width=width, dark=dark)
    shade = "-dark" if dark else ""
    open_tab(page, "Partition")
    page.wait_for_selector("#partition .cluster")
    assert page.locator("#partition .cluster img").count() == 2
    text = page.inner_text("#partition")
    assert HOSTILE in text and "held-out loss" in text and "training clips" in text
    assert page.title() not in ("1", "2")
    shoot(page, f"partition{shade}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    open_tab(page, "Islands")
    page.wait_for_selector("#island-curves svg")
    assert "reef-1" in page.inner_text("#islands") and page.locator("#islands tbody tr").count() == 4
    shoot(page, f"islands{shade}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_it_looks_again_by_itself_and_says_when_the_store_is_away(
    watched: tuple[Studio, Path], visit: Callable[..., Any], shoot: Callable[..., Path]
) -> None:
    studio, bucket = watched
    page = visit(studio)
    open_tab(page, "Islands")
    page.wait_for_selector("#islands tbody tr")
    beat(bucket, 20)
    page.wait_for_selector("#islands :text('20 of 40')")
    gone = bucket.rename(bucket.with_name("elsewhere"))
    page.wait_for_selector("#islands [role=alert]")
    said = page.inner_text("#islands [role=alert]")
    assert "cannot be reached since" in said and str(bucket) not in said
    assert "20 of 40" in page.inner_text("#islands")  # what was last seen stays
    shoot(page, "islands-away")
    gone.rename(bucket)
    page.wait_for_selector("#islands [role=alert]", state="detached")
