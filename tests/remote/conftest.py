"""A run of three tiny experts on two machines: expert 2 is served by an island in a thread of this process, the rest is here."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from tests.ensemble.conftest import build

from archipel.remote import known
from archipel.remote.known import Admission
from archipel.run import Run
from archipel.serving import island as islands
from archipel.serving.island import App, Bounds, Island
from archipel.serving.limits import Limits
from archipel.serving.protocol import protocol
from archipel.serving.server import listen

TOKEN = "a-token-of-the-tests"


class Counted:
    """An application that counts what it is asked: (method, path)."""

    def __init__(self, app: Any) -> None:
        self.app, self.asked = app, list[str]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.asked.append(scope["path"])
        await self.app(scope, receive, send)


@contextlib.contextmanager
def listening(app: Any, **bounds: Any) -> Iterator[str]:
    """The URL of an application on this machine."""
    sock = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        app, http=protocol(Limits(**bounds)), ws="none", lifespan="off", access_log=False, log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        sock.close()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, whole; to be read only."""
    return build(tmp_path_factory.mktemp("whole") / "run").root


@pytest.fixture(scope="session")
def island(root: Path) -> Island:
    return islands.opened(root, "2", device="cpu")


@pytest.fixture(scope="session")
def served(island: Island) -> Iterator[Counted]:
    """The island's server, with ``url`` and ``asked``; at most 4 clips a request."""
    counted: Any = Counted(App(island, [TOKEN], Bounds(rows=4, steps=20)))
    with listening(counted) as url:
        counted.url = url
        yield counted


def offered(run: Run, island: Island, url: str, **over: Any) -> None:
    """Write down that expert 2 is at ``url``, and that it was admitted."""
    about = {"token_env": "ISLAND_TOKEN", **over}
    lines = "\n".join(f"{key} = {_toml(value)}" for key, value in about.items())
    (run.root / "site.toml").write_text(f'[remote.2]\nurl = "{url}"\n{lines}\n')
    shapes = island.shapes
    known.record(
        run.root / known.FOLDER,
        Admission(
            run.id,
            "2",
            url,
            island.version,
            "ada",
            "velocity",
            list(shapes.latent),
            list(shapes.text),
            False,
            4,
            20,
            "",
        ),
    )


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.fixture
def apart(root: Path, island: Island, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """``apart(url, **site)``: a copy of the run without expert 2, which is asked at ``url``."""
    monkeypatch.setenv("ISLAND_TOKEN", TOKEN)

    def make(url: str, **site: Any) -> Run:
        run = Run.open(shutil.copytree(root, tmp_path / "run"))
        shutil.rmtree(run.expert("2"))
        offered(run, island, url, **site)
        return run

    return make
