"""Fixtures of tests: real stores on loopback. A folder, S3 (moto), Azure (azurite), Google's XML API (ours)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.servers import AzuriteServer, MotoServer, Server, TinyGcsServer

_NUMBER = itertools.count(1)
_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_HOST")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    with MotoServer() as server:
        server.make_bucket("runs")
        yield server


@pytest.fixture(scope="session")
def az_server() -> Iterator[Server]:
    with AzuriteServer() as server:
        server.make_bucket("runs")
        yield server


@pytest.fixture(scope="session")
def gs_server() -> Iterator[Server]:
    with TinyGcsServer() as server:
        server.make_bucket("runs")
        yield server


@pytest.fixture
def no_clouds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of whoever runs the tests names no store."""
    import os

    for name in list(os.environ):
        if name.startswith(_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def s3_url(s3_server: Server, no_clouds: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own in an S3 bucket; the environment says where it is."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://runs/t{next(_NUMBER)}"


@pytest.fixture(params=["file", "s3", "gs", pytest.param("az", marks=pytest.mark.system)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path, no_clouds: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place in each kind of store in turn."""
    if request.param == "file":
        folder = tmp_path / "store"
        folder.mkdir()
        return f"file://{folder}"
    server: Server = request.getfixturevalue(f"{request.param}_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"{request.param}://runs/t{next(_NUMBER)}"
