"""A twentieth of `make faults`: every kind of fault, really made, each held to the same promises as in the full count."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARE = 0.05


def make(groups: list[str], folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Run groups of faults side by side, each in a process of its own, and give all their records."""
    names = [name for group in groups for name in group.split(",")]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    processes = []
    for number, group in enumerate(groups):
        words = ["--share", str(SHARE), "--only", group, "--out", str(folder / f"{number}.json")]
        with open(folder / f"{number}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "faults", *words, "--work", str(folder / str(number))],
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": path, "FAULTS_OF": str(folder)},
                )
            )
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # it ends what it started
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
    said = "\n".join((folder / f"{number}.log").read_text(errors="replace")[-3000:] for number in range(len(groups)))
    assert codes == [0] * len(groups), said
    records: dict[str, dict[str, Any]] = {}
    for number in range(len(groups)):
        records |= json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))
    assert sorted(records) == sorted(names)
    for name, record in records.items():
        assert record["ok"] and record["made"] >= record["wanted"] > 0 and not record["problems"], (name, record)
        assert record["rows"], name
        assert all(row.get("weights", "identical") == "identical" for row in record["rows"]), (name, record["rows"])
    return records


def left(folder: Path) -> list[str]:
    """Command lines of processes that were started for ``folder`` and are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"FAULTS_OF={folder}".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " "))
        except OSError:
            continue
    return [words for words in found if words]


@pytest.mark.system
@pytest.mark.timeout(900)
def test_a_twentieth_of_all_faults_leaves_the_same_weights(tmp_path: Path) -> None:
    records = make(["kills", "proxied,races", "stopped,network,damage"], tmp_path, 800)
    assert left(tmp_path) == [], "processes were left behind"
    assert {row["store"] for row in records["races"]["rows"]} == {"file", "s3"}
    for row in records["races"]["rows"]:
        assert row["one winner"] == row["races"] >= 50 and row["losers who did not know the winner"] == 0
    assert sum(row["kills"] for row in records["kills"]["rows"]) >= 10
    assert all(row["accepted work lost"] == 0 for row in records["kills"]["rows"])
    assert records["damage"]["facts"].get("silently used", 0) == 0
    assert records["damage"]["facts"]["refused by name"] and records["damage"]["facts"]["healed"]
    assert {row["stopped"] for row in records["stopped"]["rows"]} == {
        "at a random moment",
        "its commit on the way to the store",
        "its commit done, the answer lost",
    }


@pytest.mark.system
@pytest.mark.timeout(900)
def test_full_disks_and_clocks_a_day_apart(tmp_path: Path) -> None:
    records = make(["disk", "clocks"], tmp_path, 800)
    assert left(tmp_path) == []
    assert {row["full"] for row in records["disk"]["rows"]} == {"the island's folder", "the bucket"}
    assert sum(row["ends with a sentence and code 2"] for row in records["disk"]["rows"]) >= 1
    assert {row["clocks, days"] for row in records["clocks"]["rows"]} == {"+1, -1", "-1, +1"}


def test_the_page_has_a_place_for_every_fault_and_keeps_the_prose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from faults import page

    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    copy = tmp_path / "reliability.md"
    copy.write_text(text, encoding="utf-8")
    record: dict[str, Any] = {
        "what": "a|b", "made": 3, "ok": False, "seconds": 1.5, "seed": 1, "date": "d", "commit": "c", "share": 1.0,
        "rows": [{"store": "file", "kills": 2}, {"store": "s3", "kills": 1}], "facts": {}, "refusals": {}, "problems": ["p"],
    }  # fmt: skip
    page.renew(copy, dict.fromkeys(page.ORDER, record))
    once = copy.read_text(encoding="utf-8")
    page.renew(copy, dict.fromkeys(page.ORDER, record))
    assert copy.read_text(encoding="utf-8") == once, "renewing twice changes nothing"
    assert once.count("| **all** | 3 |") == len(page.ORDER) and "a\\|b" in once and "**no: 1 problems**" in once
    for line in text.splitlines():
        if line.startswith(("#", "<!--")):
            assert line in once
