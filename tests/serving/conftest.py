"""A tiny run of real parts, served: in this process (``client``), or by the command in one of its own (``started``)."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from tests.ensemble.conftest import build
from tests.listening import Listening

from archipel.errors import ArchipelError
from archipel.run import Run
from archipel.serving.limits import Limits
from archipel.serving.server import opened

KEY = "a-key-of-the-tests"
Served = Callable[..., AbstractContextManager[TestClient]]


class Generator:
    """What a server needs of an Archipelago, without the arithmetic: clips of one colour, steps that can be held up."""

    def __init__(self, run: Run) -> None:
        self.config, self.model = run.config, "archipel-stand-in"
        self.parts = SimpleNamespace(source=SimpleNamespace(where=str(run.root)))
        self.calls: list[dict[str, Any]] = []
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()
        self.let_go = True  # when the server is asked to end, so that nobody waits for what is held up

    def refresh(self) -> list[str]:
        return []

    def lineup(self, settings: Any, clusters: Any, clips: int) -> None:
        if settings.strategy == "monolith":
            raise ArchipelError(f"not there yet in {self.parts.source.where}: monolith")

    def generate(self, prompts: list[str], *, on_step: Callable[..., None], **given: Any) -> Any:
        self.calls.append({"prompts": list(prompts), **given})
        for step in range(1, 5):
            self.begun.set()
            assert self.go.wait(30)
            on_step(step, 4, None, 0.0)
        if "spoil" in prompts:
            raise ArchipelError(f"{self.parts.source.where}/experts/0 is spoilt")
        if "crash" in prompts:
            raise RuntimeError("secret")
        clips = self.config.clips
        value = (np.array(given["seeds"]) % 256).astype(np.uint8)[:, None, None, None, None]
        shown = np.broadcast_to(value, (len(prompts), clips.frames, 8, 8, 3))
        weights = np.tile(np.float32([0.75, 0.25, 0.0]), (len(prompts), 4, 1))
        notes = [{"seed": seed} for seed in given["seeds"]]
        return SimpleNamespace(
            clips=shown, fps=clips.fps, notes=notes, weights=weights, expert_rows=8 * len(prompts), router_rows=0
        )


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("served") / "run").root


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("served-image") / "run", expert={"tasks": [1.0, 5.0, 0.0, 0.0]}).root


@pytest.fixture
def generator(root: Path) -> Generator:
    return Generator(Run.open(root))


@pytest.fixture
def serve(generator: Generator, tmp_path: Path) -> Served:
    """``with serve(keys=[...], **limits) as client``: the application on the stand-in, state in ``tmp_path / "state"``."""

    @contextlib.contextmanager
    def run(
        keys: Sequence[str] = (), with_: Generator = generator, safety: Any = None, **limits: Any
    ) -> Iterator[TestClient]:
        with opened(with_, tmp_path / "state", [*keys], Limits(**limits), safety=safety) as app:  # type: ignore[arg-type]
            headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
            given: dict[str, Any] = {"base_url": "http://127.0.0.1:8000", "headers": headers}
            with TestClient(app, raise_server_exceptions=False, **given) as client:
                try:
                    yield client
                finally:
                    if with_.let_go:
                        with_.go.set()

    return run


class Process(Listening):
    """``archipel serve``."""

    def __init__(self, root: Path, key: str, *options: str) -> None:
        super().__init__("serve", root, *options, key=key)


@pytest.fixture
def started(root: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Servers of one copied run and one state; whatever still lives at the end is killed."""
    copy = Path(shutil.copytree(root, tmp_path / "run"))
    everyone: list[Process] = []

    def start(*options: str) -> Process:
        everyone.append(Process(copy, KEY, *options))
        return everyone[-1]

    yield start
    for one in everyone:
        one.kill()


@pytest.fixture(scope="session")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One that is left running; ``server.state``: its folder."""
    state = tmp_path_factory.mktemp("state")
    process = Process(root, KEY, "--state", str(state))
    process.state = state
    yield process
    process.kill()
