"""Shared fixtures. With ARCHIPEL_REQUIRE_ALL=1 a skipped test is a failed one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Small tensors on a crowded machine: one thread is many times faster than two that wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if os.environ.get("ARCHIPEL_REQUIRE_ALL") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and ARCHIPEL_REQUIRE_ALL=1 allows no skips: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache folder."""
    monkeypatch.setenv("ARCHIPEL_CACHE", str(tmp_path_factory.mktemp("cache", numbered=True)))
