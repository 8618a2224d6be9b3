"""A reverse proxy that makes faults on purpose in front of an object store: the network and the store at their worst.

What happens to a request is decided by rules and a seed, per method, key and how often that key was asked for before:
the same requests meet the same faults in whatever order threads send them. ``counts`` says what was really done.
Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

BEFORE = ("status", "drop", "slow")  # the store never hears of a "status" or a "drop"
AFTER = ("status-after", "lose", "cut", "trickle", "corrupt")  # the store has done what was asked
_HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "proxy-connection",
    "content-length",
}


@dataclass(frozen=True)
class Rule:
    """A fault and which requests meet it.

    fault: "status" (an HTTP ``status`` instead of asking the store), "status-after" (the same, after the store did it),
    "drop" (connection reset before the store hears of it), "lose" (reset after the store did it), "slow" (``seconds``
    before asking), "cut" (reset in the middle of the answer), "trickle" (the answer's body in pieces over ``seconds``),
    "corrupt" (one bit of the answer's body turned).
    rate: share of matching requests, in [0, 1]. methods: such as ("PUT",); empty: all. keys: regular expression searched
    in the path. first: only the first so many requests of one method and key (0: all).
    """

    fault: str
    rate: float = 1.0
    methods: tuple[str, ...] = ()
    keys: str = ""
    status: int = 503
    seconds: float = 0.0
    first: int = 0

    def __post_init__(self) -> None:
        if self.fault not in BEFORE + AFTER:
            raise ValueError(f"{self.fault!r} is no fault: {', '.join(BEFORE + AFTER)}")

    @property
    def label(self) -> str:
        return f"{self.fault} {self.status}" if self.fault.startswith("status") else self.fault


class Proxy:
    """Listens on a loopback port and forwards to ``upstream`` (``http://host:port``). Use as a context."""

    def __init__(
        self, upstream: str, rules: Iterable[Rule] = (), *, seed: int = 0, host: str = "127.0.0.1", port: int = 0
    ):
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.rules: list[Rule] = list(rules)
        self.strip: set[str] = set()  # lower-case names of headers that never reach the store
        self.seed, self.host, self.port = seed, host, port
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str]] = Counter()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._closed = threading.Event()
        self._away = 0

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> Proxy:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._hang_up()

    # --- the store gone and back ------------------------------------------------------------------------------------

    def gone(self, seconds: float) -> threading.Thread:
        """Refuse connections and break those that are open, for ``seconds``; the thread that ends it is returned."""
        self.leave()

        def back() -> None:
            if not self._closed.wait(seconds):
                self.come_back()

        thread = threading.Thread(target=back, daemon=True)
        thread.start()
        return thread

    def leave(self) -> None:
        """Refuse connections, and break the open ones, until `come_back`."""
        with self._lock:
            self._away += 1
            self.counts["gone"] += 1
        self._hang_up()

    def come_back(self) -> None:
        with self._lock:
            self._away -= 1
            back = self._away == 0 and not self._closed.is_set()
        if back:
            self._listen()

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for attempt in range(100):  # connections of the same port that are just going away
            try:
                listener.bind((self.host, self.port))
                break
            except OSError:
                if attempt == 99:
                    raise
                time.sleep(0.05)
        listener.listen(512)
        self.port, self._listener = listener.getsockname()[1], listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                _Handler(connection, address, self)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _hang_up(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
            listener.close()
        with self._lock:
            broken = list(self._open)
        for connection in broken:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # --- what happens to a request ------------------------------------------------------------------------------------

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def choose(self, method: str, path: str) -> Rule | None:
        """The first rule that strikes this request, or None."""
        path = unquote(path)
        with self._lock:
            number = self._seen[method, path]
            self._seen[method, path] += 1
            self.counts["requests"] += 1
            rules = list(self.rules)
        for place, rule in enumerate(rules):
            if (rule.methods and method not in rule.methods) or not re.search(rule.keys, path):
                continue
            if rule.first and number >= rule.first:
                continue
            if random.Random(f"{self.seed} {place} {method} {path} {number}").random() < rule.rate:
                self.count(rule.label)
                return rule
        return None


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, and one to the store."""

    protocol_version = "HTTP/1.1"
    timeout = 300

    def __init__(self, connection: socket.socket, address: Any, proxy: Proxy) -> None:
        self.proxy = proxy
        self._store: http.client.HTTPConnection | None = None
        try:
            super().__init__(connection, address, proxy)  # type: ignore[arg-type]
        finally:
            if self._store is not None:
                self._store.close()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: counts tell."""

    def _handle(self) -> None:
        body = self._body()
        rule = self.proxy.choose(self.command, self.path)
        fault = rule.fault if rule else ""
        if rule and fault == "drop":
            return self._reset()
        if rule and fault == "status":
            return self._refuse(rule.status)
        if rule and fault == "slow":
            time.sleep(rule.seconds)
        try:
            status, headers, data = self._ask(body)
        except (OSError, http.client.HTTPException):
            return self._reset()
        if rule and fault == "lose":
            return self._reset()
        if rule and fault == "status-after":
            return self._refuse(rule.status)
        if fault == "corrupt" and data:
            place = random.Random(f"{self.proxy.seed} {self.path}").randrange(len(data) * 8)
            data = data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]
        return self._answer(status, headers, data, rule)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP | self.proxy.strip}
        if body or self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        self._store = http.client.HTTPConnection(*self.proxy.upstream, timeout=300)
        try:
            self._store.request(self.command, self.path, body, headers)
            answer = self._store.getresponse()
            data = answer.read()
        finally:
            self._store.close()
        if self.command == "HEAD":
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP - {"content-length"}]
        else:
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
            kept.append(("Content-Length", str(len(data))))
        return answer.status, kept, data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, rule: Rule | None) -> None:
        head = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}", *(f"{k}: {v}" for k, v in headers)]
        lead = ("\r\n".join(head) + "\r\n\r\n").encode("latin-1")
        if rule and rule.fault == "cut":
            whole = lead + data
            self.wfile.write(whole[: len(lead) + len(data) // 2 if data else len(lead) // 2])
            self.wfile.flush()
            return self._reset()
        self.wfile.write(lead)
        if rule and rule.fault == "trickle" and data:
            pieces = min(20, len(data))
            for i in range(pieces):
                time.sleep(rule.seconds / pieces)
                self.wfile.write(data[len(data) * i // pieces : len(data) * (i + 1) // pieces])
                self.wfile.flush()
            return None
        self.wfile.write(data)
        return None

    def _refuse(self, status: int) -> None:
        code = {409: "ConditionalRequestConflict", 429: "TooManyRequests", 503: "SlowDown"}.get(status, "InternalError")
        data = f"<Error><Code>{code}</Code><Message>made by the fault proxy</Message></Error>".encode()
        if self.command == "HEAD":
            data = b""
        self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(data)))], data, None)

    def _reset(self) -> None:
        """End the connection by RST: the client cannot take it for a finished answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def rough(rate: float, seconds: float = 0.3) -> list[Rule]:
    """Every fault at once, each on ``rate`` of the requests: the weather that a long run should survive."""
    return [
        Rule("status", rate, status=500),
        Rule("status", rate, status=503),
        Rule("status", rate, status=429),
        Rule("status", rate, ("PUT",), status=409),
        Rule("status-after", rate, ("PUT",), status=500),
        Rule("drop", rate),
        Rule("lose", rate),
        Rule("cut", rate),
        Rule("slow", rate, seconds=seconds),
        Rule("trickle", rate, ("GET",), seconds=seconds),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="A store's proxy that makes every fault at a rate; Ctrl-C ends it.")
    parser.add_argument("upstream", help="http://host:port of the store")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with Proxy(options.upstream, rough(options.rate), seed=options.seed, port=options.port) as proxy:
        print(proxy.endpoint, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print(json.dumps(dict(proxy.counts)), file=sys.stderr)


if __name__ == "__main__":
    main()
