"""Connections that dawdle, half close, or are too many, on a server in this process; and other kinds of runs through it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from tests.serving.conftest import KEY, Generator

from archipel.run import Run
from archipel.serving.limits import Limits
from archipel.serving.protocol import LEAST, protocol
from archipel.serving.server import listen, opened

HEADERS = {"Authorization": f"Bearer {KEY}"}
STALL, SIZE = 0.5, 24 << 20


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
    (state / "clips" / f"{name}.mp4").write_bytes(b"\0" * SIZE)
    return f"/v1/videos/{name}/content"


def reader(url: str, path: str) -> socket.socket:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    one.settimeout(20)
    one.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    one.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
    return one


def test_who_does_not_take_what_is_sent_is_cut_and_holds_nobody_up(url: str, large: str) -> None:
    slow, begin = [reader(url, large) for _ in range(3)], time.monotonic()
    with httpx.Client(base_url=url, headers=HEADERS, timeout=60) as client:
        assert len(client.get(large).content) == SIZE  # meanwhile, another has it whole
    with contextlib.suppress(ConnectionResetError):
        while time.monotonic() - begin < 8 * STALL:
            for one in slow:
                one.recv(1)
            time.sleep(0.1)
    for one in slow:
        with one, pytest.raises(ConnectionResetError):  # not an end that looks like one
            for _ in range(SIZE):
                assert one.recv(1 << 16)


def test_who_takes_a_little_each_time_is_not_cut() -> None:
    waits, cut = iter([9 * LEAST, 8 * LEAST, 0, 5 * LEAST, 5 * LEAST, 5 * LEAST, 4 * LEAST, 4 * LEAST]), []
    made = protocol(Limits())
    one = made.__new__(made)
    one.loop = SimpleNamespace(call_later=lambda *_: None)
    one.flow = SimpleNamespace(resume_writing=lambda: None)
    one.transport = SimpleNamespace(
        get_write_buffer_size=lambda: next(waits), get_extra_info=lambda _: None, abort=lambda: cut.append(True)
    )
    for took in (False, False, False, False, True, True, False):  # as much waits again, of which some was taken
        if took:
            one.resume_writing()
        one._look()
        assert not cut
    one._look()
    assert cut == [True]


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
            heard = b""
            while piece := one.recv(65536):
                heard += piece
            head, _, body = heard.partition(b"\r\n\r\n")
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
