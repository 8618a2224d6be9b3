"""Answers and addresses of a remote expert that are not believed: each is one lost expert, and none is mixed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.remote.conftest import TOKEN, Counted

from archipel.contracts import Conditioning
from archipel.errors import ArchipelError, ConfigError, LostExpertError
from archipel.islands import site
from archipel.remote import address, wire
from archipel.remote.address import Origin
from archipel.remote.expert import Offer, RemoteExpert
from archipel.remote.link import Link
from archipel.serving.island import Island

ROWS = 2


class Scripted:
    """A server of our own on this machine that reads a request and then does as ``act(connection)`` says."""

    def __init__(self, act: Callable[[socket.socket], Any]) -> None:
        self.sock, self.asked = socket.create_server(("127.0.0.1", 0)), list[bytes]()
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self._act = act
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            with connection:
                try:
                    self.asked.append(_request(connection))
                    self._act(connection)
                except OSError:
                    pass


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += connection.recv(65536)
    return head


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    everyone: list[Scripted] = []

    def make(act: Callable[[socket.socket], Any]) -> Scripted:
        everyone.append(Scripted(act))
        return everyone[-1]

    yield make
    for one in everyone:
        one.sock.close()


def _ask(island: Island, url: str, *, token: str = TOKEN, seconds: float = 20.0, **more: Any) -> torch.Tensor:
    offer = Offer("2", island.version, island.shapes, more.pop("prediction", "velocity"), 4, 20)
    expert = RemoteExpert(Link(address.parse(url, "url"), token, **more), offer, seconds=seconds)
    L, D, P = island.shapes.text
    cond = Conditioning(torch.zeros(ROWS, L, D), torch.zeros(ROWS, L, dtype=torch.bool), torch.zeros(ROWS, P))
    return expert(torch.zeros(ROWS, *island.shapes.latent), torch.full((ROWS,), 0.5), cond)


def _lost(island: Island, url: str, words: str, **more: Any) -> None:
    with pytest.raises(LostExpertError, match=words):
        _ask(island, url, **more)


def _answering(island: Island, body: bytes, *headers: str, status: str = "200 OK") -> Callable[[socket.socket], Any]:
    told = [f"HTTP/1.1 {status}", f"{wire.VERSION}: {island.version}", f"Content-Length: {len(body)}", *headers]
    return lambda connection: connection.sendall("\r\n".join(told).encode() + b"\r\n\r\n" + body)


def _v(island: Island, change: Callable[[np.ndarray], Any] = lambda v: None, dtype: Any = np.float32) -> bytes:
    v = np.ones((ROWS, *island.shapes.latent), dtype)
    changed = change(v)
    return wire.pack({"v": v if changed is None else changed})


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_right_answer_is_taken(island: Island, scripted: Any) -> None:
    assert bool((_ask(island, scripted(_answering(island, _v(island))).url) == 1).all())


def _spoil(value: float) -> Callable[[np.ndarray], Any]:
    def change(v: np.ndarray) -> None:
        v[1, 0, 0, 0, 0] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_spoil(np.nan), "not finite"),
        (_spoil(np.inf), "not finite"),
        (_spoil(3e38), "root mean square inf"),
        (lambda v: v * 100, "velocity of root mean square 100, at most 8 is believed"),
        (lambda v: v[:1], "expected F32"),
        (lambda v: v[:, :1], "expected F32"),
        (lambda v: v.astype(np.float16), "F16"),
        (lambda v: v.astype(np.int64), "I64"),
    ],
)
def test_what_a_velocity_cannot_be(change: Any, words: str, island: Island, scripted: Any) -> None:
    _lost(island, scripted(_answering(island, _v(island, change))).url, words)


def test_bodies_that_are_none(island: Island, scripted: Any) -> None:
    right = _v(island)
    bodies = {
        b"": "no safetensors",
        b"\x80\x04" + bytes(40): "header",
        (1 << 40).to_bytes(8, "little") + b"{}  ": "header of",
        right[:-4]: "ends behind|end at",
        right + b"more": "end at",
        wire.pack({"w": np.ones(3, np.float32)}): "does not belong",
        wire.pack({"v": np.ones(1, np.float32), "w": np.ones(1, np.float32)}): "does not belong",
    }
    for body, words in bodies.items():
        _lost(island, scripted(_answering(island, body)).url, words)


def test_another_experts_answer(island: Island, scripted: Any) -> None:
    body = _v(island)
    told = f"HTTP/1.1 200 OK\r\n{wire.VERSION}: {'0' * 64}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    _lost(island, scripted(lambda connection: connection.sendall(told + body)).url, "admit it again")


def test_a_redirect_is_not_followed(island: Island, scripted: Any) -> None:
    target = scripted(_answering(island, _v(island)))
    first = scripted(_answering(island, b"", f"Location: {target.url}/v1/velocity", status="307 Temporary Redirect"))
    _lost(island, first.url, "redirect")
    assert target.asked == []


def test_a_wrong_token(island: Island, served: Counted) -> None:
    _lost(island, served.url, "does not know the token", token="another-token")
    _lost(island, served.url, "does not know the token", token="")


def test_more_than_an_answer_holds(island: Island, scripted: Any) -> None:
    _lost(island, scripted(_answering(island, bytes(1 << 20))).url, "more than the")
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"

    def endless(connection: socket.socket) -> None:
        connection.sendall(
            f"HTTP/1.1 200 OK\r\n{wire.VERSION}: {island.version}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(1000):
            connection.sendall(chunk)

    _lost(island, scripted(endless).url, "more than the")


def test_slow_answers_end_in_time(island: Island, scripted: Any) -> None:
    stop = threading.Event()

    def drip(head: bytes, piece: bytes) -> Callable[[socket.socket], Any]:
        def act(connection: socket.socket) -> None:
            connection.sendall(head)
            while not stop.wait(0.05):
                connection.sendall(piece)

        return act

    begin = time.monotonic()
    for head, piece in (
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"z"),
    ):
        _lost(island, scripted(drip(head, piece)).url, "did not answer within 0.5 s", seconds=0.5)
    stop.set()
    assert time.monotonic() - begin < 15


def test_an_answer_that_ends_early_and_none_at_all(island: Island, scripted: Any) -> None:
    right = _v(island)
    short = _answering(island, right)
    _lost(island, scripted(lambda connection: short(_Half(connection))).url, "cannot be asked|end")
    _lost(island, scripted(lambda connection: None).url, "cannot be asked")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    _lost(island, f"http://127.0.0.1:{port}", "cannot be asked")


class _Half:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def sendall(self, data: bytes) -> None:
        self._connection.sendall(data[: len(data) // 2])


def test_a_busy_island_is_asked_again_and_a_closed_connection_opened_again(island: Island, scripted: Any) -> None:
    right, busy = _answering(island, _v(island)), _answering(island, b"", "Connection: close", status="503 Busy")
    asked: list[int] = []

    def act(connection: socket.socket) -> None:
        asked.append(1)
        (busy if len(asked) < 3 else right)(connection)

    assert bool((_ask(island, scripted(act).url) == 1).all()) and len(asked) == 3


def test_a_lost_expert_stays_lost(island: Island, scripted: Any) -> None:
    server = scripted(_answering(island, b"", status="500 Broken"))
    offer = Offer("2", island.version, island.shapes, "velocity", 4, 20)
    told: list[str] = []
    expert = RemoteExpert(Link(address.parse(server.url, "url")), offer, on_lost=told.append)
    L, D, P = island.shapes.text
    cond = Conditioning(torch.zeros(1, L, D), torch.zeros(1, L, dtype=torch.bool), torch.zeros(1, P))
    for _ in range(2):
        with pytest.raises(LostExpertError):
            expert(torch.zeros(1, *island.shapes.latent), torch.ones(1), cond)
    assert len(server.asked) == 1 and len(told) == 1


def test_numbers_that_16_bits_cannot_carry(island: Island) -> None:
    with pytest.raises(ArchipelError, match="leave fp16 off"):
        wire.half(np.array([1e5], np.float32), "x")


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://island.example",
        "http://127.1",
        "http://2130706433",
        "http://10.0.0.1",
        "ftp://island.example",
        "file:///etc/passwd",
        "https://ada:secret@island.example",
        "https://island.example/?token=secret",
        "https://island.example/#a",
        "https://island.example/a/../b",
        "https://island.example:99999",
        "https://",
        "https://isl\nand.example",
        "island.example",
    ],
)
def test_urls_that_are_none_of_ours(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        address.parse(url, "remote.2.url")
    assert "secret" not in str(error.value)


def test_an_origin_is_written_one_way() -> None:
    assert str(address.parse("HTTPS://Island.Example:443/a/", "url")) == "https://island.example"
    assert address.parse("https://island.example/a/", "url").path == "/a"
    assert str(address.parse("http://[::1]:8000", "url")) == "http://[::1]:8000"


NEVER = [
    "169.254.169.254", "169.254.1.1", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "100.100.100.200", "168.63.129.16",
    "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "0.0.0.0", "::", "224.0.0.1", "255.255.255.255",
]  # fmt: skip
PRIVATE = ["10.1.2.3", "192.168.0.7", "172.16.0.1", "100.64.0.1", "fd12::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"]


def _resolve(monkeypatch: pytest.MonkeyPatch, *found: str, private: bool = False, scheme: str = "https") -> Any:
    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, 1, 6, "", (one, port)) for one in found]

    monkeypatch.setattr(address.socket, "getaddrinfo", look_up)
    return address.resolve(Origin(scheme, "island.example", 443), private=private, seconds=5)


@pytest.mark.parametrize("found", NEVER)
@pytest.mark.parametrize("private", [False, True])
def test_link_local_and_metadata_addresses_never(found: str, private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArchipelError, match=r"never asked|single machine"):
        _resolve(monkeypatch, found, private=private)


@pytest.mark.parametrize("found", PRIVATE)
def test_private_addresses_by_the_setting_only(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArchipelError, match="private = true"):
        _resolve(monkeypatch, found)
    assert _resolve(monkeypatch, found, private=True)


def test_a_name_for_this_machine_and_a_name_with_one_bad_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArchipelError, match="leads to this machine"):
        _resolve(monkeypatch, "127.0.0.1")
    with pytest.raises(ArchipelError, match="never asked"):
        _resolve(monkeypatch, "93.184.216.34", "169.254.169.254")
    with pytest.raises(ArchipelError, match="another machine"):
        _resolve(monkeypatch, "93.184.216.34", scheme="http")
    assert _resolve(monkeypatch, "93.184.216.34", "2606:2800:220:1::1")


def test_both_addresses_of_localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, 1, 6, "", ("::1", 80)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 80))]
    monkeypatch.setattr(address.socket, "getaddrinfo", lambda *_, **__: found)
    for host in ("localhost", "::1"):
        assert len(address.resolve(Origin("http", host, 80), private=False, seconds=5)) == 2


def test_a_name_that_changes_after_it_was_judged_changes_nothing(
    island: Island, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection goes to the address that was judged: the name is looked up once."""
    server, real, asked = scripted(_answering(island, _v(island))), socket.getaddrinfo, list[str]()

    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "169.254.169.254", *rest, **more)

    monkeypatch.setattr(address.socket, "getaddrinfo", look_up)
    assert bool((_ask(island, server.url.replace("127.0.0.1", "localhost")) == 1).all()) and asked == ["localhost"]


def test_a_refused_address_is_a_lost_expert_and_proxies_are_not_used(
    island: Island, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, proxy = scripted(_answering(island, _v(island))), scripted(_answering(island, b""))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    assert bool((_ask(island, server.url) == 1).all()) and proxy.asked == []
    _lost(island, "https://169.254.169.254", "never asked")


# --- site.toml -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[remote.2]\nurl = "https://a.example"\ntoken_env = "hf_aBcDeF"', "not the token itself"),
        ('[remote.2]\nurl = "https://ada:hf_aBcDeF@a.example"', "credentials"),
        ('[remote.two]\nurl = "https://a.example"', "expert's number"),
        ('[remote.2]\nurl = "https://a.example"\nverify = false', "not a key"),
        ("[remote.2]\nprivate = true", "url"),
        (
            '[remote.1]\nurl = "https://a.example"\ntoken_env = "T"\n[remote.2]\nurl = "https://b.example"\ntoken_env = "T"',
            "token_env of two origins",
        ),
    ],
)
def test_sections_that_cannot_be(text: str, words: str, tmp_path: Any) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        site.read(tmp_path)
    assert "hf_aBcDeF" not in str(error.value)
