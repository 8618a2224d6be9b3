"""Requests drawn from the server's own OpenAPI description (schemathesis), and bent ones: never a 5xx, answers as described."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from schemathesis import checks
from tests.serving.conftest import KEY, Generator

from archipel.run import Run
from archipel.serving.limits import Limits
from archipel.serving.protocol import protocol
from archipel.serving.server import listen, opened

checks.load_all_checks()
CHECKS = [
    checks.CHECKS.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
]
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def url(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on the stand-in, in a thread."""
    generator = Generator(Run.open(image_root))
    limits = Limits(queue=5, body_seconds=0.5, head_seconds=0.5)
    with opened(generator, tmp_path_factory.mktemp("state"), [KEY], limits) as app:  # type: ignore[arg-type]
        server = uvicorn.Server(uvicorn.Config(app, http=protocol(limits), log_config=None, access_log=False))
        with listen("127.0.0.1", 0) as sock:
            thread = threading.Thread(target=server.run, args=([sock],))
            thread.start()
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
            server.should_exit = True
            thread.join(20)


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_any_request_is_answered_as_described(url: str, mode: schemathesis.GenerationMode) -> None:
    description = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=HEADERS)
    seen = []
    for operation in description.get_all_operations():
        asked = operation.ok()
        seen.append(asked.label)
        _hold(asked.as_strategy(generation_mode=mode))
    assert "POST /v1/videos" in seen and "GET /v1/videos/{video_id}/events" in seen and len(seen) == 10


def _hold(cases: SearchStrategy[schemathesis.Case]) -> None:
    @given(case=cases)
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def answered(case: schemathesis.Case) -> None:
        case.validate_response(case.call(headers=HEADERS), checks=CHECKS)

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong about a route without parameters
        answered()


def test_whoever_dawdles_is_let_go(url: str) -> None:
    port, begin = int(url.rpartition(":")[2]), time.monotonic()
    whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    body = f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n{{".encode()
    slow = {b"": b"", b"GET / HT": b"", whole + b"GET / HT": b" 200 ", body: b" 408 "}
    for start, wanted in slow.items():
        with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
            one.sendall(start)
            heard = b""
            while piece := one.recv(4096):
                heard += piece
            assert wanted in heard and heard.count(b"HTTP/1.1 ") == (1 if wanted else 0)
    assert time.monotonic() - begin < 8
