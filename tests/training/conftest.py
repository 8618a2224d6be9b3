"""Fixtures of the training tests."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from archipel.run import Run

_RUNS = runpy.run_path(str(Path(__file__).with_name("runs.py")))


@pytest.fixture
def make_run() -> Callable[..., Run]:
    made: Callable[..., Run] = _RUNS["make_run"]
    return made


@pytest.fixture
def small_run(tmp_path: Path, make_run: Callable[..., Run]) -> Run:
    """A run whose shards are there and whose experts learn in 24 steps of 10 ms."""
    return make_run(tmp_path / "run")
