"""moto's S3 server in a process of its own, with atomic conditional writes unless told otherwise.

moto looks whether a key is there, and then writes it, in threads that do not wait for each other: two conditional PUTs
can both win (`python -m faults.raw` shows how often). Real S3 does not do so. Here a lock makes each write one step.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any


class OneWriteAtATime:
    """WSGI: a request that writes runs alone, after its body has arrived, so that a slow sender holds up nobody."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app, self._lock = app, threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._app(environ, start_response)
        if length := environ.get("CONTENT_LENGTH"):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(length)))
        with self._lock:
            return list(self._app(environ, start_response))


def main(host: str, port: int, how: str) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    app: Any = DomainDispatcherApplication(create_backend_app)
    if how == "atomic":
        app = OneWriteAtATime(app)
    if how == "hurried":
        sys.setswitchinterval(1e-6)
    run_simple(host, port, app, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
