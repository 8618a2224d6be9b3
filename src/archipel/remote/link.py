"""One HTTP/1.1 connection to a remote expert: bounded in time and bytes, no redirects, no proxies, one address.

``http.client`` follows no redirect and reads no proxy from the environment; what it lacks is a limit on the whole of an answer,
which a server that sends a byte a second would stretch for ever. The socket below has one.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any

from archipel.errors import ArchipelError, LostExpertError
from archipel.remote import address
from archipel.remote.address import Origin

_PIECE = 1 << 18  # bytes read at a time
_AGAIN = (429, 503)  # busy: asked again while there is time
_PAUSE = (0.05, 1.0)  # seconds between two such questions: first, longest


class _Timed:
    """A socket as ``http.client`` uses one, all of whose reads and writes end before ``until`` (monotonic seconds)."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw, self.until = raw, 0.0

    def _wait(self) -> None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.raw.settimeout(left)

    def sendall(self, data: Any) -> None:
        self._wait()
        self.raw.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self), 1 << 16)

    def close(self) -> None:
        """``http.client`` calls this while it still reads; the link closes the socket itself."""


class _Reader(io.RawIOBase):
    def __init__(self, timed: _Timed) -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._timed._wait()
        return self._timed.raw.recv_into(buffer)


class Link:
    """Requests to one origin, one at a time; the connection is kept between them.

    token: sent to this origin only. ca: a file of certificates to trust instead of the system's. private: see ``address``.
    """

    def __init__(self, origin: Origin, token: str = "", *, connect: float = 5.0, private: bool = False, ca: str = ""):
        self.origin = origin
        self._token, self._connect, self._private, self._ca = token, connect, private, ca
        self._lock = threading.Lock()
        self._timed: _Timed | None = None
        self._client: http.client.HTTPConnection | None = None
        self._closed = False
        self.sent = self.received = 0  # bytes of bodies
        self.requests = 0

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        seconds: float,
        most: int,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[dict[str, str], bytes]:
        """Headers (lower case) and body, at most ``most`` bytes, of a 200, within ``seconds`` in all.

        A server that is busy (429, 503) is asked again while there is time; one that closed a kept connection, once. Raises
        LostExpertError for any other answer and for none, ArchipelError for an address that may not be asked.
        """
        told, until, pause = dict(headers or {}), time.monotonic() + seconds, _PAUSE[0]
        with self._lock:
            while True:
                status, found, data = self._once(method, path, body, told, until, most, seconds)
                if status == 200:
                    return found, data
                if status not in _AGAIN or time.monotonic() + pause >= until:
                    raise LostExpertError(_said(status, found, data))
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE[1])

    def close(self) -> None:
        """End whatever is on its way; the link is not used again."""
        self._closed = True
        timed = self._timed
        if timed is not None:
            with contextlib.suppress(OSError):
                timed.raw.shutdown(socket.SHUT_RDWR)

    # --- one request ---------------------------------------------------------------------------------------------

    def _once(
        self, method: str, path: str, body: bytes | None, told: dict[str, str], until: float, most: int, seconds: float
    ) -> tuple[int, dict[str, str], bytes]:
        kept = self._timed is not None
        try:
            try:
                return self._exchange(method, path, body, told, until, most)
            except (ConnectionError, http.client.BadStatusLine, ssl.SSLEOFError):
                self._drop()  # RemoteDisconnected is both
                if not kept or self._closed:
                    raise
                return self._exchange(method, path, body, told, until, most)
        except TimeoutError as error:
            self._drop()
            raise LostExpertError(f"{self.origin} did not answer within {seconds:g} s") from error
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            self._drop()
            raise LostExpertError(f"{self.origin} cannot be asked ({_short(error)})") from error
        except BaseException:
            self._drop()
            raise

    def _exchange(
        self, method: str, path: str, body: bytes | None, told: dict[str, str], until: float, most: int
    ) -> tuple[int, dict[str, str], bytes]:
        client, timed = self._open(until)
        timed.until = until
        if self._token:
            told = {**told, "Authorization": f"Bearer {self._token}"}
        self.requests += 1
        client.request(method, self.origin.path + path, body, {"User-Agent": "archipel", **told})
        self.sent += len(body or b"")
        answer = client.getresponse()
        if answer.length is not None and answer.length > most:
            raise _too_much(most)
        data = bytearray()
        while piece := answer.read1(_PIECE):
            data += piece
            if len(data) > most:
                raise _too_much(most)
        if answer.length:
            raise http.client.IncompleteRead(b"", answer.length)
        answer.close()  # its reader only: the connection is free for the next request
        self.received += len(data)
        if answer.will_close:
            self._drop()
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}, bytes(data)

    def _open(self, until: float) -> tuple[http.client.HTTPConnection, _Timed]:
        if self._closed:
            raise LostExpertError("the connection was closed")
        if self._client is not None and self._timed is not None:
            return self._client, self._timed
        raw = self._connected(min(self._connect, max(0.001, until - time.monotonic())))
        client: http.client.HTTPConnection
        if self.origin.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=self._ca or None)
                raw = context.wrap_socket(raw, server_hostname=self.origin.host)
            except BaseException:
                raw.close()
                raise
            client = http.client.HTTPSConnection(self.origin.host, self.origin.port, context=context)
        else:
            client = http.client.HTTPConnection(self.origin.host, self.origin.port)
        timed = _Timed(raw)
        client.sock, client.auto_open = timed, 0
        self._client, self._timed = client, timed
        return client, timed

    def _connected(self, seconds: float) -> socket.socket:
        """A connection to an address that was judged; each is tried within what is left of ``seconds``."""
        until, last = time.monotonic() + seconds, OSError("no address")
        for family, place in address.resolve(self.origin, private=self._private, seconds=seconds):
            raw = socket.socket(family, socket.SOCK_STREAM)
            try:
                raw.settimeout(max(0.001, until - time.monotonic()))
                raw.connect(place)
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                raw.settimeout(max(0.001, until - time.monotonic()))
                return raw
            except OSError as error:
                raw.close()
                last = error
        if isinstance(last, TimeoutError):
            raise OSError(f"no connection within {seconds:g} s")
        raise last

    def _drop(self) -> None:
        timed, self._timed, self._client = self._timed, None, None
        if timed is not None:
            with contextlib.suppress(OSError):
                timed.raw.close()


def _too_much(most: int) -> ArchipelError:
    return LostExpertError(f"it answered with more than the {most} bytes that belong into an answer")


def _said(status: int, headers: Mapping[str, str], data: bytes) -> str:
    """What an answer other than 200 is called; of a stranger's text the beginning only, and nothing that a terminal obeys."""
    if 300 <= status < 400:
        return f"it answered with a redirect ({status}), which is not followed"
    known = {401: "it does not know the token", 403: "it refuses this machine's requests", 404: "there is no expert"}
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in data[:200].decode("ascii", "replace"))
    return f"{known.get(status, 'it answered with an error')} ({status}{': ' + text if text else ''})"


def _short(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in str(text))[:200]
