"""Connections that dawdle, half close, or are too many, on a server in this process; and other kinds of runs through it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from tests.serving.conftest import KEY, Generator

from archipel.run import Run
from archipel.serving.limits import Limits
from archipel.serving.protocol import protocol
from archipel.serving.server import listen, opened

HEADERS = {"Authorization": f"Bearer {KEY}"}
STALL = 0.3


@contextlib.contextmanager
def served(generator: Any, state: Path, limits: Limits) -> Iterator[str]:
    with opened(generator, state, [KEY], limits) as app:
        server = uvicorn.Server(uvicorn.Config(app, http=protocol(limits), log_config=None, access_log=False))
        with listen("127.0.0.1", 0) as sock:
            thread = threading.Thread(target=server.run, args=([sock],))
            thread.start()
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
            server.should_exit = True
            thread.join(20)


def until_done(client: openai.OpenAI, name: str) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        video = client.videos.retrieve(name)
        if video.status in ("completed", "failed"):
            return video
        time.sleep(0.05)
    raise AssertionError(video)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def url(root: Path, state: Path) -> Iterator[str]:
    with served(Generator(Run.open(root)), state, Limits(stall_seconds=STALL, connections=20)) as url:
        yield url


@pytest.fixture(scope="module")
def large(url: str, state: Path) -> str:
    """The path of a clip of 24 MB."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    name = client.videos.create(prompt="x").id
    until_done(client, name)
    (state / "clips" / f"{name}.mp4").write_bytes(b"\0" * (24 << 20))
    return f"/v1/videos/{name}/content"


def reader(url: str, path: str) -> socket.socket:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    one.settimeout(20)
    one.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    one.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
    return one


def test_who_does_not_take_what_is_sent_is_cut_and_holds_nobody_up(url: str, large: str) -> None:
    slow, got, begin = [reader(url, large) for _ in range(5)], 0, time.monotonic()
    with httpx.Client(base_url=url, headers=HEADERS, timeout=20) as client:
        assert len(client.get(large).content) == 24 << 20  # meanwhile, another has it whole
    with pytest.raises(ConnectionResetError):  # not an end that looks like one
        while time.monotonic() - begin < 15:
            for one in slow:
                got += len(one.recv(1))
            time.sleep(0.05)
    assert got < 5000
    for one in slow:
        one.close()


def test_who_is_slow_but_reads_is_not_cut(url: str, large: str) -> None:
    with reader(url, large) as one:
        got, end = 0, time.monotonic() + 6 * STALL
        while time.monotonic() < end:
            got += len(one.recv(1 << 17))
            time.sleep(0.02)
        while got < 24 << 20:
            piece = one.recv(1 << 20)
            assert piece
            got += len(piece)


def test_a_client_that_ended_its_side_gets_its_answer(url: str) -> None:
    for path, wanted in (("/v1/models", b'"object":"list"'), ("/v1/videos/nothing", b"not_found")):
        with reader(url, path) as one:
            one.shutdown(socket.SHUT_WR)
            heard = b""
            while piece := one.recv(4096):
                heard += piece
        assert wanted in heard and heard.startswith(b"HTTP/1.1 ")
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as one:
        one.sendall(b"GET /healthz HTTP/1.1\r\nHo")
        one.shutdown(socket.SHUT_WR)
        assert one.recv(100) == b""


def test_what_uvicorn_answers_itself_has_the_form_of_all_others(url: str) -> None:
    port = int(url.rpartition(":")[2])
    for start in (b"\x16\x03\x01 nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"A" * 70_000):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
            one.sendall(start)
            head, _, body = one.recv(65536).partition(b"\r\n\r\n")
            assert b" 400 " in head and b"application/json" in head
            assert json.loads(body)["error"]["code"] == "invalid_http"
    others = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(20)]
    try:
        answer = httpx.get(f"{url}/v1/models", headers=HEADERS, timeout=20)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "busy" and answer.headers["retry-after"]
    finally:
        for one in others:
            one.close()
    end = time.monotonic() + 10
    while httpx.get(f"{url}/v1/models", headers=HEADERS, timeout=20).status_code == 503 and time.monotonic() < end:
        time.sleep(0.05)
    assert httpx.get(f"{url}/v1/models", headers=HEADERS, timeout=20).status_code == 200
