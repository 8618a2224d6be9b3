"""A small run, published: what most tests of islands start from."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults.fixtures import az_server, gs_server, no_clouds, s3_server, s3_url, store_url  # noqa: F401

from archipel import store
from archipel.islands.bucket import Bucket
from archipel.islands.publish import publish
from archipel.progress import StopFlag
from archipel.run import Run

_RUNS = runpy.run_path(str(Path(__file__).parents[1] / "training" / "runs.py"))


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """Runs with shards and codec folder, heartbeats of 2 s and leases of 6."""

    def make(root: Path, **over: dict) -> Run:
        run: Run = _RUNS["make_run"](root, **{"islands": {"heartbeat": 2.0, "lease": 6.0}} | over)
        store.write_tensors(run.codec / "model.safetensors", {"mean": np.zeros(3, np.float32)})
        store.write_card(run.codec, "codec", run.id, ["model.safetensors"])
        return run

    return make


@pytest.fixture
def small_run(tmp_path: Path, make_run: Callable[..., Run]) -> Run:
    return make_run(tmp_path / "run")


@pytest.fixture
def bucket(tmp_path: Path, small_run: Run) -> Bucket:
    """The small run in a folder's bucket."""
    url = (tmp_path / "bucket").as_uri()
    with StopFlag() as stop:
        publish(small_run, url, stop)
    return Bucket.open(url, small_run.id, patience=10)


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with honest results (see forge.py), published and as a folder: (bucket, folder). Copy before changing."""
    forge = runpy.run_path(str(Path(__file__).with_name("forge.py")))
    root = tmp_path_factory.mktemp("honest")
    run = forge["make_run"](root / "folder")
    return forge["make_bucket"](run, root / "bucket"), root / "folder"
