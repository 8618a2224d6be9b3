"""An export of a tiny run whose experts and router have random weights, and the pipeline over it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from tests.ensemble.conftest import build

from archipel import ArchipelPipeline
from archipel.exchange.folder import export
from archipel.run import Run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run to look at; tests that change one take ``own``."""
    return build(tmp_path_factory.mktemp("exchange") / "run")


@pytest.fixture
def own(whole: Run, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(whole.root, tmp_path / "own"))


@pytest.fixture(scope="session")
def exported(whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests do not write into it."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(whole.root, folder, monolith=True)
    return folder


@pytest.fixture(scope="session")
def loaded(exported: Path) -> ArchipelPipeline:
    pipe = ArchipelPipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded: ArchipelPipeline, exported: Path) -> ArchipelPipeline:
    """The pipeline with its own scheduler, whatever the test before made of it."""
    loaded.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(exported, subfolder="scheduler")
    return loaded
