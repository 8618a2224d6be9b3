"""What the partition's page knows of a run's folder, a bucket and an export, and that nothing of it becomes markup."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.studio.folders import make

from archipel import store
from archipel.partition import sheets
from archipel.run import Run
from archipel.studio import partition_facts
from archipel.studio.partition_facts import Cluster, Expert, Partition
from archipel.studio.partition_page import html

HOSTILE = '</li><img src=x onerror="alert(1)"> {{7*7}} ${7*7} **bold** `code` $x$'


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two clusters; expert 0 is trained, expert 1 on its way."""
    run = make(tmp_path / "run")
    quality = {"method": "kmeans", "features": "text", "sizes": {"clips": {"train": [30, 10], "validation": [3, 1]}}}
    store.write_json(run.partition / "quality.json", quality)
    captions = {"0": [{"caption": HOSTILE, "id": "a", "distance": 0.1}], "1": [{"caption": "a blue ball"}, 7]}
    store.write_json(run.partition / "captions.json", captions)
    for which in range(2):
        sheets.draw(np.zeros((2, 2, 16, 16, 3), np.uint8), run.partition / f"sheet-{which}.png")
    card = {"steps": 40, "parameters": 1234, "seconds": 9.0, "validation": {"raw": {"loss": 2.0}, "ema": {"loss": 1.5}}}
    store.write_card(run.expert("0"), "expert", run.id, [], **card)
    store.write_json(run.expert("1") / "progress.json", {"step": 7, "steps": 40, "state": "training"})
    return run


def test_a_run_tells_sheets_captions_sizes_and_its_experts_numbers(run: Run) -> None:
    found = partition_facts.of_run(run)
    first, second = found.clusters
    assert first.clips == {"train": 30, "validation": 3} and (first.share, second.share) == (0.75, 0.25)
    assert first.sheet.startswith("data:image/webp;base64,") and first.size[0] > 0
    assert first.expert == Expert("trained", 40, 1.5, 1234, 9.0)  # the loss of the averaged weights
    assert second.expert.state == "at step 7 of 40" and second.captions == ("a blue ball",)
    assert found.monolith == Expert("not trained yet") and not found.missing


def test_sheets_are_hidden_on_request_and_the_page_says_so(run: Run) -> None:
    found = partition_facts.of_run(run, clips=False)
    assert not any(one.sheet for one in found.clusters) and "--no-clips" in found.missing[0]
    assert "<img" not in html(found)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    found = partition_facts.of_run(make(tmp_path / "fresh"))
    assert len(found.clusters) == 2 and "archipel partition fresh" in found.missing[0]


def test_damaged_files_are_named_and_the_rest_is_shown(run: Run) -> None:
    (run.partition / "captions.json").write_text("{")
    (run.partition / "sheet-0.png").write_bytes(b"no picture")
    (run.partition / "sheet-1.png").unlink()
    (run.partition / "sheet-1.png").symlink_to("/etc/hostname")
    found = partition_facts.of_run(run)
    assert found.clusters[0].clips["train"] == 30 and not any(one.sheet for one in found.clusters)
    said = " ".join(found.missing)
    assert "captions.json" in said and "sheet-0.png" in said and str(run.root) not in said


def test_an_export_tells_the_cards_that_it_carries(tmp_path: Path) -> None:
    card = {"steps": 5, "train_clips": 8, "validation_clips": "many", "validation": None}
    store.write_json(tmp_path / "archipel.json", {"cards": {"0": card, "monolith": {"steps": 9}}})
    config: Any = SimpleNamespace(partition=SimpleNamespace(k=2, method="kmeans", features="text"))
    found = partition_facts.of_export(tmp_path, config)
    assert found.clusters[0].clips == {"train": 8} and found.clusters[0].expert.steps == 5
    assert found.clusters[1].expert.state == "not in this export" and found.clusters[0].share is None
    assert "holds no clips" in found.missing[0]


def test_nothing_that_was_written_elsewhere_becomes_markup() -> None:
    one = Cluster(HOSTILE, "t0", Expert(HOSTILE), {"train": 1}, 1.0, (HOSTILE,))
    page = html(Partition((one,), HOSTILE, HOSTILE, ((HOSTILE, HOSTILE),), Expert(HOSTILE), (HOSTILE,)))
    assert "<img" not in page and "&lt;img" in page


def test_the_style_sheets_are_package_data() -> None:
    """An installed studio reads them beside its modules."""
    import tomllib

    root = Path(__file__).parents[2]
    listed = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    patterns = listed["archipel"]
    sheets = [path.relative_to(root / "src" / "archipel") for path in (root / "src/archipel/studio").glob("*.css")]
    assert sheets and all(any(path.match(pattern) for pattern in patterns) for path in sheets)
