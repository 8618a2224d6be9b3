"""One expert over HTTP: what it tells, whom it answers, and requests that are malformed, too large, slow or cut off."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from tests.remote.conftest import TOKEN, listening

from archipel import store
from archipel.remote import wire
from archipel.serving import island as islands
from archipel.serving.island import App, Bounds, Island

HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": wire.MEDIA}


@pytest.fixture(scope="module")
def island(root: Path) -> Island:
    return islands.opened(root, "2", device="cpu")


@pytest.fixture(scope="module")
def url(island: Island) -> Iterator[str]:
    with listening(App(island, [TOKEN], Bounds(rows=2, steps=4, body_seconds=1.0)), head_seconds=1.0) as there:
        yield there


def _send(url: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
    client = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    told = {name: value for name, value in {**HEADERS, **headers}.items() if value}
    client.request(method, path, body, told)
    answer = client.getresponse()
    data = answer.read()
    client.close()
    return answer.status, answer.headers, data


def _body(island: Island, rows: int = 1, **change: Any) -> dict[str, np.ndarray]:
    L, D, P = island.shapes.text
    ones = np.ones(rows, np.float32)
    body = {"x": np.zeros((rows, *island.shapes.latent), np.float32), "t": ones * 0.5, "a": ones * 2, "b": -ones}
    text = {"tokens": np.ones((rows, L, D), np.float32), "mask": np.ones((rows, L), np.bool_)}
    body |= {**text, "pooled": np.zeros((rows, P), np.float32), **change}
    return {name: value for name, value in body.items() if value is not None}


def test_what_it_tells_and_answers(url: str, island: Island, root: Path) -> None:
    assert _send(url, "GET", "/healthz", Authorization="")[::2] == (200, b'{"status":"ok"}')
    status, headers, data = _send(url, "GET", "/v1/expert")
    import json

    told = json.loads(data)
    assert status == 200 and headers[wire.VERSION] == told["version"] == store.sha256_bytes(told["card"].encode())
    assert (told["expert"], told["limits"]["rows"], told["signature"]) == ("2", 2, "")
    status, headers, data = _send(url, "POST", "/v1/velocity", wire.pack(_body(island, 2)))
    v = wire.unpack(data)[0]["v"]
    assert status == 200 and v.shape == (2, *island.shapes.latent) and headers[wire.VERSION] == island.version
    assert str(root) not in str(told)


def test_whom_it_answers(url: str, island: Island) -> None:
    for path in ("/v1/expert", "/v1/velocity", "/", "/docs"):
        for token in ("", "Bearer wrong", f"Basic {TOKEN}", "Bearer"):
            assert _send(url, "GET", path, Authorization=token)[0] == 401
    assert _send(url, "GET", "/v1/expert", Origin="https://evil.example")[0] == 403
    assert _send(url, "GET", "/v1/velocity")[0] == 405 and _send(url, "GET", "/docs")[0] == 404
    with listening(App(island, [], Bounds())) as there:
        assert _send(there, "GET", "/v1/expert", Authorization="")[0] == 200
        assert _send(there, "GET", "/v1/expert", Authorization="", Host="rebound.example")[0] == 403


def test_bodies_that_do_not_fit(url: str, island: Island) -> None:
    C, T, H, W = island.shapes.latent
    wrong: dict[str, Any] = {
        "x": [np.zeros((1, C, T, H, W + 1), np.float32), np.zeros((1, C, T, H, W)), None, np.float32(1)[None]],
        "t": [np.full(1, 1.5, np.float32), np.full(1, np.nan, np.float32), np.zeros(2, np.float32)],
        "a": [np.full(1, 1e6, np.float32), np.zeros(1, np.float16)],
        "mask": [np.zeros((1, 99), np.bool_), np.zeros((1, 5), np.int64), None],
        "tokens": [np.zeros((1, 4, 384), np.float32)],
        "pooled": [np.full((1, 384), np.inf, np.float32)],
        "image": [np.zeros((1, C + 1, T, H, W), np.float32)],
    }
    for name, values in wrong.items():
        for value in values:
            status, _, data = _send(url, "POST", "/v1/velocity", wire.pack(_body(island, **{name: value})))
            assert status == 400 and name.encode() in data, (name, data)
    assert _send(url, "POST", "/v1/velocity", wire.pack(_body(island, 3)))[0] in (400, 413)  # more rows than it takes
    right = wire.pack(_body(island))
    for body in (b"", b"\x80\x04" + right, right[:-1], right + b"\0", b"\xff" * 8 + right[8:]):
        assert _send(url, "POST", "/v1/velocity", body)[0] == 400
    assert _send(url, "POST", "/v1/velocity", right, **{"Content-Type": "application/json"})[0] == 415
    assert _send(url, "POST", "/v1/velocity", right, **{wire.VERSION: "0" * 64})[0] == 412


def test_settings_of_whole_clips(url: str, island: Island) -> None:
    text = {name: value for name, value in _body(island).items() if name in ("tokens", "mask", "pooled")}
    body = {"seeds": np.array([7], np.int64), **text}
    how = {"steps": "2", "solver": "euler", "shift": "1.0", "guidance": "2.0", "dtype": "F32"}
    status, _, data = _send(url, "POST", "/v1/latents", wire.pack(body, how))
    assert status == 200 and wire.unpack(data)[0]["x"].shape == (1, *island.shapes.latent)
    for change in (
        {"steps": "5"},
        {"steps": "two"},
        {"shift": "nan"},
        {"guidance": "1e9"},
        {"solver": "__import__"},
        {"x": "1"},
    ):
        assert _send(url, "POST", "/v1/latents", wire.pack(body, {**how, **change}))[0] == 400
    assert _send(url, "POST", "/v1/latents", wire.pack(body))[0] == 400
    assert _send(url, "POST", "/v1/latents", wire.pack({**body, "seeds": np.array([-1], np.int64)}, how))[0] == 400


def _raw(url: str, data: bytes, *, close: bool = False) -> bytes:
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:  # type: ignore[arg-type]
        connection.sendall(data)
        if close:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        while piece := connection.recv(65536):
            found += piece
        return found


def test_oversized_slow_and_half_closed_requests(url: str, island: Island) -> None:
    head = f"POST /v1/velocity HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {wire.MEDIA}\r\n"
    assert b" 413 " in _raw(url, f"{head}Content-Length: {1 << 40}\r\n\r\n".encode())
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    most = island.shapes.body_bytes(2)
    try:
        told = _raw(url, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * (most // 0x10000 + 2))
    except ConnectionResetError:  # cut off while it was still being sent
        told = b" 413 "
    assert b" 413 " in told
    begin = time.monotonic()
    assert b" 408 " in _raw(url, f"{head}Content-Length: 1000\r\n\r\nabc".encode())
    assert _raw(url, b"GET /v1/exp") == b"" and time.monotonic() - begin < 20
    assert b" 200 " not in _raw(url, f"{head}Content-Length: 1000\r\n\r\nabc".encode(), close=True)
    assert b" 401 " in _raw(url, f"POST /v1/velocity HTTP/1.1\r\nHost: a\r\nContent-Length: {1 << 40}\r\n\r\n".encode())
    assert _send(url, "GET", "/v1/expert")[0] == 200  # and it is still there


def test_a_busy_island_says_so(island: Island) -> None:
    with listening(App(island, [TOKEN], Bounds(waiting=0))) as there:
        status, headers, _ = _send(there, "POST", "/v1/velocity", wire.pack(_body(island)))
        assert status == 503 and headers["Retry-After"] == "1"
