"""``archipel serve``: one process that listens, one thread in it that makes clips."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel import store
from archipel.errors import ArchipelError
from archipel.serving.keys import check_exposure, read_keys
from archipel.serving.limits import Limits
from archipel.serving.protocol import settings
from archipel.serving.service import Service, Tell

if TYPE_CHECKING:
    from archipel.ensemble.pipeline import Archipelago
    from archipel.ensemble.safety import Safety


# Given the FastAPI application and its service before the first request: more pages, for as long as the context is open.
Extend = Callable[[Any, Service], AbstractContextManager[None]]


def settle(host: str) -> list[str]:
    """The keys of the environment. Raises ArchipelError (before anything is loaded) where ``host`` may not be bound to."""
    keys = read_keys(os.environ)
    check_exposure(host, keys)
    return keys


def listen(host: str, port: int) -> socket.socket:
    """Raises ArchipelError where the address is taken or not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise ArchipelError(f"cannot listen on {host}, port {port}: {said}") from error


@contextlib.contextmanager
def opened(
    archipelago: Archipelago,
    folder: Path,
    keys: list[str],
    limits: Limits,
    extend: Extend | None = None,
    safety: Safety | None = None,
) -> Iterator[Any]:
    """The application for as long as this process alone works on ``folder``. Raises LockedError where another does."""
    from archipel.serving import app

    folder.mkdir(parents=True, exist_ok=True)
    with store.lock(folder / "lock", f"the clips in {folder}"):
        try:
            service = Service.open(archipelago, folder, keys, limits, safety)
        except sqlite3.OperationalError as error:
            raise ArchipelError(
                f"the list of jobs in {folder} cannot be written ({error}): is the disk full?"
            ) from error
        made = app.make(service)
        with extend(made, service) if extend else contextlib.nullcontext():
            yield made


def warm(archipelago: Archipelago, tell: Tell) -> None:
    """Load what the run's own strategy needs, so that the first client does not wait for it; say what is not there yet."""
    try:
        archipelago.generate(["a"], steps=1, guidance=1.0, solver="euler")
    except ArchipelError as error:
        tell(f"warning: clips cannot be made as this run stands: {error}")


def serve(
    archipelago: Archipelago,
    folder: Path,
    *,
    host: str,
    port: int,
    keys: list[str],
    limits: Limits,
    tell: Tell,
    extend: Extend | None = None,
    safety: Safety | None = None,
) -> None:
    """Listen until the process is stopped. ``folder``: where jobs and clips are kept; ``extend``: pages beyond the interface;
    ``safety``: the switch for public serving."""
    check_exposure(host, keys)
    sys.setswitchinterval(0.001)  # the models' thread gives way to clients sooner than after Python's 5 ms
    warm(archipelago, tell)
    with (
        contextlib.closing(listen(host, port)) as sock,
        opened(archipelago, folder, keys, limits, extend, safety) as app,
    ):
        shown = f"[{host}]" if ":" in host else host
        tell(f"listening on http://{shown}:{sock.getsockname()[1]}{'' if keys else ' (no key: this machine only)'}")
        _server(settings(app, limits, grace=10), app).run(sockets=[sock])


def _server(config: Any, app: Any) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Ends streams of progress when it shall stop: they would hold it up until its patience is over."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            super().handle_exit(sig, frame)
            if (ending := getattr(app.state, "ending", None)) is not None:
                ending.set()

    return Server(config)
